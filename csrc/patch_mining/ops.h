// The arguments and schemas of patch-info mining. vlmfast/ops/patch_mining/definition.py defines what is computed.
#pragma once

#include <optional>

#include "common/common.h"

namespace vlmfast {

struct MiningArguments {
  Size batch{"batch"}, channels = Size("channels").at_least(1).at_most(kHalfInt), height{"height"}, width{"width"};
  Size tokens{"tokens"};
  FloatDtype dtype;
  View<4> feature_map;
  View<3> query, grad_output;
  View<2> blocks;
  int64_t columns, total;  // blocks in a row of the map, and in all of it

  MiningArguments(const Tensor& query_tensor, const Tensor& map_tensor, int64_t scale,
                  const std::optional<Tensor>& blocks_tensor,
                  const std::optional<Tensor>& grad_output_tensor = std::nullopt)
      : feature_map("feature_map", map_tensor, {batch, channels, height, width}, dtype),
        query("query", query_tensor, {batch, tokens, channels}, dtype),
        grad_output("grad_output", grad_output_tensor, {batch, tokens, channels}, dtype),
        blocks("blocks", blocks_tensor, {batch, tokens}, Dtype::kInt64) {
    check_within("scale", scale, 1, 1 << 15);
    STD_TORCH_CHECK(height % scale == 0 && width % scale == 0, "the sides of feature_map must be divisible by scale, ",
                    scale, ", got ", int64_t{height}, " and ", int64_t{width});
    columns = width / scale;
    total = height / scale * columns;
    STD_TORCH_CHECK(blocks_tensor.has_value() || tokens == total, "query must have a token for each of ", total,
                    " blocks, got ", int64_t{tokens});
    check_within("the number of blocks", total, 0, kHalfInt);
  }
};

}  // namespace vlmfast

#define VLMFAST_OPS(OP)                                                                           \
  OP(mine_patches,                                                                                \
     "(Tensor query, Tensor feature_map, SymInt scale, Tensor? blocks=None, "                     \
     "float norm_eps=1.0000000000000001e-05) -> Tensor")                                          \
  OP(mine_patches_backward,                                                                       \
     "(Tensor grad_output, Tensor query, Tensor feature_map, SymInt scale, Tensor? blocks=None, " \
     "float norm_eps=1.0000000000000001e-05) -> (Tensor, Tensor)")
