// Multiplies each row by its own factor, on CUDA, with one block per row.
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

Tensor scale_rows(const Tensor& x, const Tensor& factors) {
  const ScaleArguments args(x, factors);
  Tensor y = allocate({args.batch, args.hidden}, x, args.dtype);
  if (y.numel() == 0) return y;
  const DeviceScope scope(x);
  with_dtype(args.dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    check_cuda(launch(scale_rows_kernel<scalar_t>, dim3(args.batch), dim3(128), 0, scope.stream(),
                      scope.input<scalar_t>(args.x), scope.input<scalar_t>(args.factors), scope.output<scalar_t>(y),
                      int64_t{args.hidden}));
  });
  return y;
}

}  // namespace
}  // namespace vlmfast

VLMFAST_REGISTER_CUDA_OPS()
