"""Encoders by family; importing this package registers them all."""

from st_align.encoders import clip as clip
from st_align.encoders import conch as conch
from st_align.encoders import ctranspath as ctranspath
from st_align.encoders import gene as gene
from st_align.encoders import hibou as hibou
from st_align.encoders import lite0 as lite0
from st_align.encoders import resnet50 as resnet50
from st_align.encoders import resnet_gn as resnet_gn
from st_align.encoders import scfoundation as scfoundation
from st_align.encoders import scgpt as scgpt
from st_align.encoders import vit_timm as vit_timm
