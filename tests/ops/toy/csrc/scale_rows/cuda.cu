// Rows, each times a number of its own, on CUDA: a block for each row.
#include "common/common.cuh"
#include "common/cuda_torch.h"
#include "scale_rows/ops.h"

namespace vlmfast {
namespace {

template <typename scalar_t>
__global__ void scale_rows_kernel(Input<scalar_t, 2> x, Input<scalar_t, 1> factors, scalar_t* y, int64_t hidden) {
  const int64_t row = blockIdx.x;
  const float factor = to_float(factors.at()[row]);
  for (int64_t column = threadIdx.x; column < hidden; column += blockDim.x) {
    y[row * hidden + column] = from_float<scalar_t>(to_float(x.at(row)[column]) * factor);
  }
}

Tensor scale_rows(const Tensor& x_tensor, const Tensor& factors_tensor) {
  Size batch("batch"), hidden("hidden");
  FloatDtype dtype;
  const View x("x", x_tensor, {batch, hidden}, dtype);
  const View factors("factors", factors_tensor, {batch}, dtype);
  Tensor y = allocate({batch, hidden}, x_tensor, dtype);
  if (y.numel() == 0) return y;
  const DeviceScope scope(x_tensor);
  with_dtype(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    check_cuda(launch(scale_rows_kernel<scalar_t>, dim3(batch), dim3(128), 0, scope.stream(), scope.input<scalar_t>(x),
                      scope.input<scalar_t>(factors), scope.output<scalar_t>(y), int64_t{hidden}));
  });
  return y;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
