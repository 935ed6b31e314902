import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the six files are modules of the folder above
