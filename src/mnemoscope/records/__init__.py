"""What a run leaves on disk, and how to read it. No torch from here on.

``schema`` says what a row is, ``store`` keeps rows in a folder, ``table`` turns rows into prompts.
"""

from .schema import Manifest as Manifest
from .schema import Nearest as Nearest
from .schema import Row as Row
from .schema import Score as Score
from .schema import Thresholds as Thresholds
from .store import Run as Run
from .store import sample_id as sample_id
from .table import PromptScore as PromptScore
from .table import prompt_scores as prompt_scores
