"""Hugging Face checkpoints in and out: config, weights and adapters."""

from jaxrl.models.huggingface.adapters import load_adapter as load_adapter
from jaxrl.models.huggingface.adapters import save_adapter as save_adapter
from jaxrl.models.huggingface.adapters import with_adapter as with_adapter
from jaxrl.models.huggingface.config import FAMILIES as FAMILIES
from jaxrl.models.huggingface.config import UnsupportedModel as UnsupportedModel
from jaxrl.models.huggingface.config import decoder_config as decoder_config
from jaxrl.models.huggingface.config import document_of as document_of
from jaxrl.models.huggingface.load import CheckpointMismatch as CheckpointMismatch
from jaxrl.models.huggingface.load import Pretrained as Pretrained
from jaxrl.models.huggingface.load import load_pretrained as load_pretrained
from jaxrl.models.huggingface.save import save_pretrained as save_pretrained
