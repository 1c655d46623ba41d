// Greedy choices on the CPU: arguments, threads, and which token comes next. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "greedy_selection/cpu_kernels.h"
#include "greedy_selection/ops.h"

namespace vlmfast {
namespace {

constexpr float kTaken = -1.0f;  // less than anything is worth

// Returns the index of the largest number, the first of equal ones.
int64_t first_largest(const std::vector<float>& worth) {
  return std::max_element(worth.begin(), worth.end()) - worth.begin();
}

// Returns the weights of a batch as float32, all 1 where none are given.
std::vector<float> weights_of(const View<2>& view, int64_t batch, int64_t tokens, const char* name) {
  std::vector<float> weights(batch * tokens, 1.0f);
  const auto& table = kernels<GreedySelectionKernels>();
  for (int64_t b = 0; view && b < batch; ++b) {
    STD_TORCH_CHECK(table.widen[view.dtype()](view.at(b), tokens, weights.data() + b * tokens), name,
                    " must be finite and not negative");
  }
  return weights;
}

enum class Told { kCosines, kDistances };

// The cosines, or distances, of one image's tokens. A choice needs the rows of few tokens, so rows are computed when
// they are first needed, a tile of them at a time.
class Likeness {
 public:
  Likeness(const TokenRows& rows, Dtype dtype, Told told)
      : rows_(rows), dtype_(dtype), told_(told), row_of_(rows.tokens) {
    panels_.columns = table_.panel_columns;
    panels_.count = (rows.tokens + panels_.columns - 1) / panels_.columns;
    columns_ = panels_.count * panels_.columns;
    elements_.reset(new float[columns_ * rows.size]);
    inverse_.reset(new float[columns_]);
    tile_.reset(new float[table_.tile_rows * rows.size]);
    panels_.elements = elements_.get();
    panels_.inverse = inverse_.get();
    on_panels(1, [&](int64_t begin, int64_t end) { table_.pack_panels[dtype_](rows_, panels_, begin, end); });
  }

  // Returns the row of a token, or null if it has not been computed.
  const float* row(int64_t token) const { return row_of_[token]; }

  bool has_direction(int64_t token) const { return inverse_[token] != 0; }

  // Computes the rows of the tokens that are worth most, up to `most` of those that are not taken, and returns these
  // tokens. Rows are cheaper together, and the next best tokens are usually needed next.
  const std::vector<int32_t>& compute(const std::vector<float>& worth, int64_t most) {
    order_.clear();
    for (int32_t token = 0; token < rows_.tokens; ++token) {
      if (row_of_[token] == nullptr && worth[token] != kTaken) order_.push_back(token);
    }
    const size_t count = std::min<size_t>(order_.size(), std::min(most, table_.tile_rows));
    std::partial_sort(order_.begin(), order_.begin() + count, order_.end(),
                      [&](int32_t a, int32_t b) { return worth[a] != worth[b] ? worth[a] > worth[b] : a < b; });
    order_.resize(count);
    blocks_.emplace_back(new float[count * columns_]);
    std::vector<float*> to(count);
    for (size_t i = 0; i < count; ++i) to[i] = row_of_[order_[i]] = blocks_.back().get() + i * columns_;
    table_.pack_tile[dtype_](rows_, order_.data(), count, tile_.get());
    on_panels(count, [&](int64_t begin, int64_t end) {
      table_.cosines(panels_, rows_.size, tile_.get(), order_.data(), count, begin, end, to.data());
      if (told_ == Told::kCosines) return;
      for (float* row : to) {
        for (int64_t column = begin * panels_.columns; column < end * panels_.columns; ++column) {
          const float distance = 1.0f - row[column];
          row[column] = distance < kSame ? 0.0f : distance;
        }
      }
    });
    return order_;
  }

 private:
  template <class Body>
  void on_panels(int64_t work, const Body& body) {
    parallel_rows(panels_.count, row_ranges(panels_.count, panels_.columns * rows_.size * work),
                  [&](int64_t begin, int64_t end, int64_t) { body(begin, end); });
  }

  const GreedySelectionKernels& table_ = kernels<GreedySelectionKernels>();
  const TokenRows rows_;
  const Dtype dtype_;
  const Told told_;
  int64_t columns_;
  TokenPanels panels_;
  std::unique_ptr<float[]> elements_, inverse_, tile_;
  std::vector<float*> row_of_;
  std::vector<std::unique_ptr<float[]>> blocks_;
  std::vector<int32_t> order_;
};

// Finds the token whose nearest other token is farthest. The least distance to some of the others is an upper bound, so
// the token with the highest bound is the one once it has been compared with all others.
int64_t first_farthest(Likeness& distances, const float* weights, int64_t tokens) {
  constexpr float kLargest = 2.0f;
  std::vector<float> nearest(tokens, kLargest), worth(tokens);
  while (true) {
    for (int64_t token = 0; token < tokens; ++token) worth[token] = nearest[token] * weights[token];
    const int64_t best = first_largest(worth);
    if (distances.row(best) != nullptr) return best;
    for (const int32_t compared : distances.compute(worth, tokens)) {
      const float* const row = distances.row(compared);
      const float own = nearest[compared];
      float least = kLargest;
      for (int64_t token = 0; token < compared; ++token) least = std::min(least, row[token]);
      for (int64_t token = compared + 1; token < tokens; ++token) least = std::min(least, row[token]);
      for (int64_t token = 0; token < tokens; ++token) nearest[token] = std::min(nearest[token], row[token]);
      nearest[compared] = std::min(own, least);
    }
  }
}

void choose_farthest(const TokenRows& rows, Dtype dtype, int64_t k, const float* weights, bool first_by_quality,
                     int64_t* positions) {
  const int64_t tokens = rows.tokens;
  Likeness distances(rows, dtype, Told::kDistances);
  const std::vector<float> alike(first_by_quality ? 0 : tokens, 1.0f);
  int64_t best = first_farthest(distances, first_by_quality ? weights : alike.data(), tokens);
  std::vector<float> nearest(distances.row(best), distances.row(best) + tokens), worth(tokens);
  std::vector<bool> taken(tokens);
  for (int64_t left = k - 1;; --left) {
    taken[best] = true;
    if (left == 0) break;
    for (int64_t token = 0; token < tokens; ++token) worth[token] = nearest[token] * weights[token];
    for (int64_t token = 0; token < tokens; ++token) worth[token] = taken[token] ? kTaken : worth[token];
    best = first_largest(worth);
    if (distances.row(best) == nullptr) distances.compute(worth, left);
    const float* const row = distances.row(best);
    for (int64_t token = 0; token < tokens; ++token) nearest[token] = std::min(nearest[token], row[token]);
  }
  for (int64_t token = 0; token < tokens; ++token) {
    if (taken[token]) *positions++ = token;
  }
}

// Where an image is, and how many of its tokens are chosen.
struct Image {
  int64_t row, first, tokens;  // the row of tokens, the first one in it, how many
  int64_t place, k;            // the first one chosen, how many
};

std::vector<Image> images_of(const ImageArguments& call, int64_t batch, int64_t tokens, int64_t k) {
  std::vector<Image> images;
  if (!call.cu_seqlens) {
    for (int64_t b = 0; b < batch; ++b) images.push_back({b, 0, tokens, b * k, k});
    return images;
  }
  const int32_t *const ends = call.cu_seqlens.at<int32_t>(), *const kept = call.cu_kept.at<int32_t>();
  const auto rises = [&](const int32_t* from, int64_t last) {
    return from[0] == 0 && from[call.count] == last && std::is_sorted(from, from + call.count + 1);
  };
  STD_TORCH_CHECK(rises(ends, tokens), "cu_seqlens must rise from 0 to ", tokens, ", the tokens of a row");
  STD_TORCH_CHECK(rises(kept, k), "cu_kept must rise from 0 to ", k, ", which is k");
  for (int64_t i = 0; i < call.count; ++i) {
    images.push_back({0, ends[i], ends[i + 1] - ends[i], kept[i], kept[i + 1] - kept[i]});
    STD_TORCH_CHECK(images[i].tokens <= call.longest, "longest must be the most tokens of an image, got ",
                    call.longest);
    STD_TORCH_CHECK(images[i].k <= images[i].tokens, "cu_kept must not rise faster than cu_seqlens");
  }
  return images;
}

// Calls choose(number, image, positions) for each image of which some tokens are chosen; positions count from its first
// token. `work` is that of the longest image.
template <class Choose>
Tensor choose_each(const std::vector<Image>& images, const Tensor& rows, int64_t batch, int64_t k, int64_t work,
                   const Choose& choose) {
  Tensor chosen = allocate({batch, k}, rows, Dtype::kInt64);
  if (chosen.numel() == 0) return chosen;
  int64_t* const positions = static_cast<int64_t*>(chosen.mutable_data_ptr());
  const int64_t count = static_cast<int64_t>(images.size());
  parallel_rows(count, row_ranges(count, work), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const Image& image = images[i];
      if (image.k == 0) continue;
      choose(i, image, positions + image.place);
      for (int64_t j = 0; j < image.k; ++j) positions[image.place + j] += image.first;
    }
  });
  return chosen;
}

// Calls choose(rows, dtype, k, weights, positions) for each image.
template <class Choose>
Tensor choose_by_features(const FeatureArguments& call, const Tensor& features_tensor, int64_t k,
                          const char* weights_name, const Choose& choose) {
  const std::vector<float> weights = weights_of(call.quality, call.batch, call.tokens, weights_name);
  const auto images = images_of(call.images, call.batch, call.tokens, k);
  return choose_each(images, features_tensor, call.batch, k, call.images.longest * call.size,
                     [&](int64_t, const Image& image, int64_t* positions) {
    const TokenRows rows{image.tokens, call.size, call.features.at(image.row, image.first),
                         call.features.stride(1) * call.features.width()};
    choose(rows, call.dtype, image.k, weights.data() + image.row * call.tokens + image.first, positions);
  });
}

Tensor farthest(const Tensor& features_tensor, int64_t k, const std::optional<Tensor>& quality_tensor,
                bool first_by_quality, const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& cu_kept,
                int64_t longest) {
  const FeatureArguments call(features_tensor, k, quality_tensor, "quality", cu_seqlens, cu_kept, longest);
  return choose_by_features(
      call, features_tensor, k, "quality",
      [&](const TokenRows& rows, Dtype dtype, int64_t each, const float* weights, int64_t* positions) {
    choose_farthest(rows, dtype, each, weights, first_by_quality, positions);
  });
}

// ---- dpp_map ----

constexpr int64_t kAhead = 12;  // rows of cosines that are computed together; most of them are needed later

void choose_diverse(const TokenRows& rows, Dtype dtype, int64_t k, const float* relevance, int64_t* positions) {
  const int64_t tokens = rows.tokens;
  const auto& table = kernels<GreedySelectionKernels>();
  Likeness cosines(rows, dtype, Told::kCosines);
  std::vector<float> left(tokens), worth(tokens);
  const std::unique_ptr<float[]> shares(new float[k * tokens]);
  for (int64_t token = 0; token < tokens; ++token) left[token] = cosines.has_direction(token) ? 1.0f : 0.0f;
  for (int64_t step = 0; step < k; ++step) {
    for (int64_t token = 0; token < tokens; ++token) {
      if (worth[token] != kTaken) worth[token] = relevance[token] * left[token] * relevance[token];
    }
    const int64_t best = first_largest(worth);
    if (!(worth[best] > 0)) {  // the chosen tokens span all others: take the most relevant ones
      std::vector<int64_t> others;
      for (int64_t token = 0; token < tokens; ++token) {
        if (worth[token] != kTaken) others.push_back(token);
      }
      std::stable_sort(others.begin(), others.end(), [&](int64_t a, int64_t b) { return relevance[a] > relevance[b]; });
      std::copy_n(others.begin(), k - step, positions + step);
      break;
    }
    positions[step] = best;
    if (step == k - 1) break;
    if (cosines.row(best) == nullptr) cosines.compute(worth, std::min(kAhead, k - 1 - step));
    table.take_off(cosines.row(best), best, step, tokens, kNothingNew, shares.get(), left.data());
    worth[best] = kTaken;
  }
  std::sort(positions, positions + k);
}

Tensor dpp_map(const Tensor& features_tensor, int64_t k, const std::optional<Tensor>& relevance_tensor,
               const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& cu_kept, int64_t longest) {
  const FeatureArguments call(features_tensor, k, relevance_tensor, "relevance", cu_seqlens, cu_kept, longest);
  return choose_by_features(call, features_tensor, k, "relevance", choose_diverse);
}

// ---- coverage ----

// The gain of a token, how much it adds to the cover, in an earlier step: an upper bound of its gain now.
struct Bound {
  float gain;
  int32_t token;
  int32_t step;  // the step that computed the gain

  // The order of a heap: the highest gain is on top, the first of equal ones.
  bool operator<(const Bound& other) const { return gain != other.gain ? gain < other.gain : token > other.token; }
};

// Chooses for one image. Gains only shrink, in float32 too, so a step recomputes only the few gains whose bounds are
// above all others.
void choose_covering(const View<3>& similarity, const Image& image, const float* weights, const float* quality,
                     int64_t* positions) {
  const int64_t tokens = image.tokens, rows = similarity.size(2);
  const auto& table = kernels<GreedySelectionKernels>();
  const auto gain = table.gain[similarity.dtype()];
  std::vector<float> covered(rows);
  std::vector<Bound> heap(tokens);
  const auto look_at = [&](int64_t token, int64_t step) {
    const float worth =
        gain(similarity.at(image.row, image.first + token), rows, covered.data(), weights) * quality[token];
    return Bound{worth, static_cast<int32_t>(token), static_cast<int32_t>(step)};
  };
  parallel_rows(tokens, row_ranges(tokens, rows), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t token = begin; token < end; ++token) heap[token] = look_at(token, 0);
  });
  std::make_heap(heap.begin(), heap.end());
  for (int64_t step = 0; step < image.k; ++step) {
    while (heap.front().step < step) {
      std::pop_heap(heap.begin(), heap.end());
      heap.back() = look_at(heap.back().token, step);
      std::push_heap(heap.begin(), heap.end());
    }
    std::pop_heap(heap.begin(), heap.end());
    positions[step] = heap.back().token;
    table.cover[similarity.dtype()](similarity.at(image.row, image.first + heap.back().token), rows, covered.data());
    heap.pop_back();
  }
  std::sort(positions, positions + image.k);
}

Tensor coverage(const Tensor& similarity_tensor, int64_t k, const std::optional<Tensor>& row_weights_tensor,
                const std::optional<Tensor>& quality_tensor, const std::optional<Tensor>& cu_seqlens,
                const std::optional<Tensor>& cu_kept, int64_t longest) {
  const CoverageArguments call(similarity_tensor, k, row_weights_tensor, quality_tensor, cu_seqlens, cu_kept, longest);
  const std::vector<float> quality = weights_of(call.quality, call.batch, call.tokens, "quality");
  const std::vector<float> weights = weights_of(call.row_weights, call.images.count, call.rows, "row_weights");
  const auto images = images_of(call.images, call.batch, call.tokens, k);
  return choose_each(images, similarity_tensor, call.batch, k, call.images.longest * call.rows,
                     [&](int64_t number, const Image& image, int64_t* positions) {
    choose_covering(call.similarity, image, weights.data() + number * call.rows,
                    quality.data() + image.row * call.tokens + image.first, positions);
  });
}

}  // namespace
}  // namespace vlmfast

VLMFAST_DEFINE_OPS(vlmfast_native)
VLMFAST_IMPLEMENT_OPS(vlmfast_native, CPU)
