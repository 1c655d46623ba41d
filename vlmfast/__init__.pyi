# Made by `make docs`.
from vlmfast import compat as compat
from vlmfast import reduce as reduce
from vlmfast.deepstack_hooks import deepstack as deepstack
from vlmfast.deepstack_hooks import deepstack_levels as deepstack_levels
from vlmfast.ops.attention_scores.definition import cls_attention as cls_attention
from vlmfast.ops.attention_scores.definition import last_row_attention as last_row_attention
from vlmfast.ops.attention_scores.definition import received_attention as received_attention
from vlmfast.ops.frame_novelty.definition import frame_change as frame_change
from vlmfast.ops.frame_novelty.definition import frame_novelty as frame_novelty
from vlmfast.ops.greedy_selection.definition import coverage as coverage
from vlmfast.ops.greedy_selection.definition import farthest as farthest
from vlmfast.ops.masked_rows.definition import compact_tokens as compact_tokens
from vlmfast.ops.masked_rows.definition import deepstack_add as deepstack_add
from vlmfast.ops.masked_rows.definition import place_embeddings as place_embeddings
from vlmfast.ops.masked_rows.definition import row_index as row_index
from vlmfast.ops.patch_mining.definition import mine_patches as mine_patches
from vlmfast.ops.pixel_shuffle.connector import pixel_shuffle_linear as pixel_shuffle_linear
from vlmfast.ops.pixel_shuffle.definition import pixel_shuffle as pixel_shuffle
from vlmfast.ops.rms_norm.definition import add_rms_norm as add_rms_norm
from vlmfast.ops.rms_norm.definition import rms_norm as rms_norm
from vlmfast.ops.rope.definition import qk_norm_rope as qk_norm_rope
from vlmfast.ops.silu_mul.definition import silu_mul as silu_mul
from vlmfast.ops.token_merge.definition import merge_tokens as merge_tokens
from vlmfast.ops.token_merge.definition import top_tokens as top_tokens
from vlmfast.ops.token_merge.definition import visionzip as visionzip
from vlmfast.patches.apply import Patch as Patch
from vlmfast.patches.apply import patch as patch
from vlmfast.patches.apply import unpatch as unpatch
from vlmfast.patches.warm_up import Warmup as Warmup
from vlmfast.patches.warm_up import warmup as warmup
from vlmfast.reduce.compress import compress_inputs as compress_inputs
from vlmfast.reduce.methods.divprune import DivPrune as DivPrune
from vlmfast.reduce.methods.even_tokens import EvenTokens as EvenTokens
from vlmfast.reduce.methods.evs import EVS as EVS
from vlmfast.reduce.methods.fastv import FastV as FastV
from vlmfast.reduce.methods.pyramid_drop import PyramidDrop as PyramidDrop
from vlmfast.reduce.methods.random_tokens import RandomTokens as RandomTokens
from vlmfast.reduce.methods.scope import SCOPE as SCOPE
from vlmfast.reduce.methods.smaller_image import SmallerImage as SmallerImage
from vlmfast.reduce.methods.vcast import VCAST as VCAST
from vlmfast.reduce.methods.visionzip import VisionZip as VisionZip
from vlmfast.registry import explain as explain
from vlmfast.registry import use as use
from vlmfast.repacking import repack as repack

__all__: list[str]
__version__: str
