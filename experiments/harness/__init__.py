"""What every experiment shares: its command line, its folder, its progress, its report."""

from experiments.harness.config import COSMETIC as COSMETIC
from experiments.harness.config import RunOptions as RunOptions
from experiments.harness.config import cli as cli
from experiments.harness.config import config_hash as config_hash
from experiments.harness.config import to_json as to_json
from experiments.harness.distributed import ProcessOptions as ProcessOptions
from experiments.harness.distributed import join as join
from experiments.harness.files import write_json as write_json
from experiments.harness.lock import FolderBusy as FolderBusy
from experiments.harness.report import Report as Report
from experiments.harness.run import Run as Run
from experiments.harness.run import RunFolderError as RunFolderError
from experiments.harness.run import clean_errors as clean_errors
from experiments.harness.run import main as main
from experiments.harness.tables import Table as Table
