import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # no test leaves games in the user's cache
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.pop("ALFWORLD_DATA", None)
sys.path.insert(0, str(Path(__file__).parent.parent))  # the six files are modules of the folder above
