"""Encoders by family; importing this package registers them all."""

from st_align.encoders import gene as gene
from st_align.encoders import lite0 as lite0
from st_align.encoders import resnet_gn as resnet_gn
