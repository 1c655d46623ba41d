// Patch-info mining on the CPU, compiled once per instruction set (see types.h).
//
// A token's block of the map is gathered once into a buffer that stays in the L2 cache, as (channels, pixels). Three
// passes over the buffer compute the means, then the deviations and the logits, then the weighted sums.
#include "patch_mining/cpu_kernels.h"

#include "common/vector_math.h"

namespace vlmfast {
namespace {

constexpr int64_t kTogether = 32;  // channels summed before they are added to the total, which limits the error
// How many channels ahead to prefetch. Each channel of a map lies on other pages, so the hardware does not prefetch
// them.
constexpr int64_t kAhead = 16;
constexpr float kMaximum = 0x1.fffffep127f;

// The buffers of a token in the workspace: rows of `size` floats, one per pixel, and rows of `channels` floats.
struct Token {
  int64_t pixels, size;  // pixels of the block, and their number padded
  float *mean, *rest, *inverse, *logits, *weights, *reached, *slopes, *terms[4];
  float *query, *grad, *sums;
  void* block;  // (channels, size) elements

  static constexpr int kRows = 11;
  static int64_t floats(int64_t channels, int64_t scale) {
    const int64_t size = padded(scale * scale);
    return kRows * size + 3 * padded(channels) + channels * size;
  }

  Token(float* at, int64_t channels, int64_t scale) : pixels(scale * scale), size(padded(pixels)) {
    for (float** row :
         {&mean, &rest, &inverse, &logits, &weights, &reached, &slopes, &terms[0], &terms[1], &terms[2], &terms[3]}) {
      *row = at;
      at += size;
    }
    for (float** row : {&query, &grad, &sums}) {
      *row = at;
      at += padded(channels);
    }
    block = at;
  }
};

// The position of the first pixel of a token's block, in the map and in its gradient.
struct Place {
  int64_t image, row, column;

  Place(const Mining& args, int64_t token) : image(token / args.tokens) {
    const int64_t own = token % args.tokens;
    const int64_t number = args.blocks == nullptr ? own : args.blocks[image * args.blocks_stride + own];
    row = number / args.columns * args.scale;
    column = number % args.columns * args.scale;
  }
};

// Calls function(bytes) with the bytes of a row of a block, as a compile-time constant for the sizes of real maps.
template <class T, class F>
VLMFAST_INLINE void with_bytes(int64_t scale, const F& function) {
  const int64_t bytes = scale * sizeof(T);
  if (bytes == 16) {
    function(std::integral_constant<int64_t, 16>{});
  } else if (bytes == 32) {
    function(std::integral_constant<int64_t, 32>{});
  } else {
    function(bytes);
  }
}

template <class T>
VLMFAST_INLINE void gather(const Mining& args, const Place& place, const Token& token) {
  const int64_t channel_stride = args.map_strides[1], row_stride = args.map_strides[2], scale = args.scale;
  const T* from =
      static_cast<const T*>(args.map) + place.image * args.map_strides[0] + place.row * row_stride + place.column;
  T* to = static_cast<T*>(token.block);
  with_bytes<T>(scale, VLMFAST_LAMBDA(auto bytes) {
    for (int64_t channel = 0; channel < args.channels; ++channel, from += channel_stride, to += token.size) {
      const T* const ahead = from + (channel + kAhead < args.channels ? kAhead : 0) * channel_stride;
      for (int64_t row = 0; row < scale; ++row) {
        __builtin_prefetch(ahead + row * row_stride);
        std::memcpy(to + row * scale, from + row * row_stride, bytes);
      }
      std::memset(to + token.pixels, 0, (token.size - token.pixels) * sizeof(T));
    }
  });
}

template <class T>
VLMFAST_INLINE void scatter(const Mining& args, const Place& place, const Token& token) {
  const int64_t scale = args.scale, plane = args.height * args.width;
  T* to = static_cast<T*>(args.grad_map) + place.image * args.channels * plane + place.row * args.width + place.column;
  const T* from = static_cast<const T*>(token.block);
  with_bytes<T>(scale, VLMFAST_LAMBDA(auto bytes) {
    for (int64_t channel = 0; channel < args.channels; ++channel, to += plane, from += token.size) {
      for (int64_t row = 0; row < scale; ++row) std::memcpy(to + row * args.width, from + row * scale, bytes);
    }
  });
}

// Copies a token's row of channels as float32, and returns its sum.
template <class T>
VLMFAST_INLINE float take(const TokenRows& rows, const Place& place, int64_t own, int64_t channels, float* to) {
  const Ordered<T>* from =
      static_cast<const Ordered<T>*>(rows.data) + place.image * rows.batch_stride + own * rows.token_stride;
  double sum = 0;
  each_block(channels, [&](int64_t offset, auto count) { store(to + offset, load(from + offset, count)); });
  for (int64_t channel = 0; channel < channels; ++channel) sum += to[channel];
  return static_cast<float>(sum);
}

VLMFAST_INLINE Block multiply_add(const Block& a, float b, const Block& c) {
  return each_part([&](int i) { return multiply_add(a.part[i], Float{} + b, c.part[i]); });
}
VLMFAST_INLINE Block multiply_add(const Block& a, const Block& b, const Block& c) {
  return each_part([&](int i) { return multiply_add(a.part[i], b.part[i], c.part[i]); });
}

// Computes the mean and the inverse deviation of each pixel, its logit and, in the backward, its dot with the gradient.
// `rest` is the mean of the centred values: the rounding error of a mean far from zero.
template <class T, bool kBackward>
VLMFAST_INLINE void measure(const Mining& args, const Token& token, float query_sum, float grad_sum) {
  const int64_t channels = args.channels, size = token.size;
  for (int64_t offset = 0; offset < size; offset += kBlock) {
    const Ordered<T>* const block = static_cast<const Ordered<T>*>(token.block) + offset;
    Block total = {};
    for (int64_t first = 0; first < channels; first += kTogether) {
      const int64_t last = first + kTogether < channels ? first + kTogether : channels;
      Block sum = {};
      for (int64_t channel = first; channel < last; ++channel) sum = sum + load(block + channel * size);
      total = total + sum;
    }
    const Block mean = total / static_cast<float>(channels);
    Block rest = {}, squares = {}, logits = {}, reached = {};
    for (int64_t first = 0; first < channels; first += kTogether) {
      const int64_t last = first + kTogether < channels ? first + kTogether : channels;
      Block some_rest = {}, some_squares = {}, some_logits = {}, some_reached = {};
      for (int64_t channel = first; channel < last; ++channel) {
        const Block centred = load(block + channel * size) - mean;
        some_rest = some_rest + centred;
        some_squares = multiply_add(centred, centred, some_squares);
        some_logits = multiply_add(centred, token.query[channel], some_logits);
        if constexpr (kBackward) some_reached = multiply_add(centred, token.grad[channel], some_reached);
      }
      rest = rest + some_rest;
      squares = squares + some_squares;
      logits = logits + some_logits;
      reached = reached + some_reached;
    }
    store(token.mean + offset, mean);
    store(token.rest + offset, rest / static_cast<float>(channels));
    store(token.inverse + offset, squares / static_cast<float>(channels));
    store(token.logits + offset, logits);
    store(token.reached + offset, reached);
  }
  for (int64_t pixel = 0; pixel < size; ++pixel) {
    const float inverse = 1.0f / __builtin_sqrtf(token.inverse[pixel] + args.eps), rest = token.rest[pixel];
    token.inverse[pixel] = inverse;
    token.logits[pixel] = (token.logits[pixel] - rest * query_sum) * inverse;
    token.reached[pixel] = (token.reached[pixel] - rest * grad_sum) * inverse;
  }
}

// Turns the logits into softmax weights. The weights of the padding are 0.
VLMFAST_INLINE void softmax(const Token& token) {
  float largest = -kMaximum;
  for (int64_t pixel = 0; pixel < token.size; ++pixel) {
    float logit = token.logits[pixel];
    logit = logit == logit ? logit : 0.0f;
    logit = logit > kMaximum ? kMaximum : logit < -kMaximum ? -kMaximum : logit;
    token.weights[pixel] = pixel < token.pixels ? logit : -__builtin_inff();
    if (pixel < token.pixels && logit > largest) largest = logit;
  }
  float sum = 0;
  for (int64_t pixel = 0; pixel < token.size; pixel += kLanes) {
    const Float weight = exp2((load_unaligned<Float>(token.weights + pixel) - largest) * kLog2E);
    std::memcpy(token.weights + pixel, &weight, sizeof(weight));
  }
  for (int64_t pixel = token.pixels; pixel < token.size; ++pixel) token.weights[pixel] = 0;
  for (int64_t pixel = 0; pixel < token.pixels; ++pixel) sum += token.weights[pixel];
  for (int64_t pixel = 0; pixel < token.pixels; ++pixel) token.weights[pixel] /= sum;
}

// Stores, for each channel, the sum of its centred pixels times their factors.
template <class T>
VLMFAST_INLINE void add_up(const Mining& args, const Token& token, const float* factors, int64_t index) {
  const int64_t channels = args.channels, size = token.size;
  const Ordered<T>* const block = static_cast<const Ordered<T>*>(token.block);
  float rest = 0;
  for (int64_t pixel = 0; pixel < token.pixels; ++pixel) rest += factors[pixel] * token.rest[pixel];
  for (int64_t first = 0; first < channels; first += kLanes) {
    Float rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t channel = first + lane < channels ? first + lane : channels - 1;
      Block sums = {};
      for (int64_t offset = 0; offset < size; offset += kBlock) {
        const Block centred = load(block + channel * size + offset) - load(token.mean + offset);
        sums = multiply_add(centred, load(factors + offset), sums);
      }
      Float sum = sums.part[0];
      for (int part = 1; part < kParts; ++part) sum = sum + sums.part[part];
      rows[lane] = sum;
    }
    const Float sums = sums_of(rows) - rest;
    std::memcpy(token.sums + first, &sums, sizeof(sums));
  }
  Ordered<T>* const y = static_cast<Ordered<T>*>(args.y) + index * channels;
  each_block(channels, [&](int64_t offset, auto count) { store(y + offset, load(token.sums + offset), count); });
}

template <class T>
void forward(const Mining& args, int64_t begin, int64_t end, float* workspace) {
  const Token token(workspace, args.channels, args.scale);
  for (int64_t index = begin; index < end; ++index) {
    const Place place(args, index);
    gather<T>(args, place, token);
    const float query_sum = take<T>(args.query, place, index % args.tokens, args.channels, token.query);
    measure<T, false>(args, token, query_sum, 0);
    softmax(token);
    for (int64_t pixel = 0; pixel < token.pixels; ++pixel) token.weights[pixel] *= token.inverse[pixel];
    add_up<T>(args, token, token.weights, index);
  }
}

// Computes the terms of the gradient of each pixel, which is terms[0] * grad + terms[1] * query - terms[2] - terms[3] *
// d, where d is the centred pixel.
VLMFAST_INLINE void gradient_terms(const Mining& args, const Token& token, float query_sum, float grad_sum) {
  double average = 0;
  for (int64_t pixel = 0; pixel < token.pixels; ++pixel) {
    average += static_cast<double>(token.weights[pixel]) * token.reached[pixel];
  }
  const float mean_reached = static_cast<float>(average), channels = static_cast<float>(args.channels);
  for (int64_t pixel = 0; pixel < token.size; ++pixel) {
    const bool finite = token.logits[pixel] >= -kMaximum && token.logits[pixel] <= kMaximum;
    const float weight = token.weights[pixel], inverse = pixel < token.pixels ? token.inverse[pixel] : 0.0f;
    const float reached = pixel < token.pixels ? token.reached[pixel] : 0.0f;
    const float slope = finite ? weight * (reached - mean_reached) : 0.0f, logit = finite ? token.logits[pixel] : 0.0f;
    token.slopes[pixel] = pixel < token.pixels ? slope * inverse : 0.0f;
    token.terms[0][pixel] = inverse * weight;
    token.terms[1][pixel] = inverse * slope;
    token.terms[3][pixel] = inverse * inverse * (weight * reached + slope * logit) / channels;
    token.terms[2][pixel] =
        inverse * (weight * grad_sum + slope * query_sum) / channels - token.terms[3][pixel] * token.rest[pixel];
  }
}

template <class T>
VLMFAST_INLINE void differentiate(const Mining& args, const Token& token) {
  Ordered<T>* const block = static_cast<Ordered<T>*>(token.block);
  for (int64_t offset = 0; offset < token.size; offset += kBlock) {
    const Block mean = load(token.mean + offset), of_grad = load(token.terms[0] + offset);
    const Block of_query = load(token.terms[1] + offset), constant = load(token.terms[2] + offset);
    const Block of_pixel = load(token.terms[3] + offset);
    for (int64_t channel = 0; channel < args.channels; ++channel) {
      Ordered<T>* const at = block + channel * token.size + offset;
      const Block along = (load(at) - mean) * of_pixel + constant;
      const Block gradient = multiply_add(of_grad, token.grad[channel], of_query * token.query[channel]);
      store(at, gradient - along);
    }
  }
}

template <class T>
void backward(const Mining& args, int64_t begin, int64_t end, float* workspace) {
  const Token token(workspace, args.channels, args.scale);
  for (int64_t index = begin; index < end; ++index) {
    const Place place(args, index);
    gather<T>(args, place, token);
    const float query_sum = take<T>(args.query, place, index % args.tokens, args.channels, token.query);
    const float grad_sum = take<T>(args.grad_output, place, index % args.tokens, args.channels, token.grad);
    measure<T, true>(args, token, query_sum, grad_sum);
    softmax(token);
    gradient_terms(args, token, query_sum, grad_sum);
    add_up<T>(args, token, token.slopes, index);
    differentiate<T>(args, token);
    scatter<T>(args, place, token);
  }
}

int64_t workspace(int64_t channels, int64_t scale) { return Token::floats(channels, scale); }

}  // namespace

template <>
PatchMiningKernels kernels_at<PatchMiningKernels, CpuLevel::VLMFAST_ISA>() {
  return {VLMFAST_BY_DTYPE(forward), VLMFAST_BY_DTYPE(backward), workspace};
}

}  // namespace vlmfast
