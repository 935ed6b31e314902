import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
sys.path.insert(0, str(Path(__file__).parent.parent))  # the six files are modules of the folder above
