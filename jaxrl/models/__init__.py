"""Decoder-only transformers and their scalar heads."""

from jaxrl.models.cache import Cache as Cache
from jaxrl.models.config import DecoderConfig as DecoderConfig
from jaxrl.models.config import LoraConfig as LoraConfig
from jaxrl.models.config import RopeScaling as RopeScaling
from jaxrl.models.decoder import LOGICAL_AXES as LOGICAL_AXES
from jaxrl.models.decoder import Decoder as Decoder
from jaxrl.models.decoder import logical_axes as logical_axes
from jaxrl.models.lora import LoraParam as LoraParam
from jaxrl.models.scalar import ScalarModel as ScalarModel
