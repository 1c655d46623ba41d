// Greedy choices on the CPU: arguments, threads, and which token comes next. The arithmetic is in cpu_kernels.cpp.
#include "common/cpu.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "greedy_selection/cpu_kernels.h"
#include "greedy_selection/ops.h"

namespace vlmfast {
namespace {

constexpr float kTaken = -1.0f;   // less than anything is worth
constexpr float kLargest = 2.0f;  // no distance is larger

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

// The cosines of one image's tokens. A choice needs the rows of few tokens, so rows are computed when they are first
// needed, a tile of them at a time.
class Cosines {
 public:
  Cosines(const TokenRows& rows, Dtype dtype) : rows_(rows), dtype_(dtype), row_of_(rows.tokens) {
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

  // Computes the rows of the tokens that are worth most, up to `most` of those that are not taken. Rows are cheaper
  // together, and the next best tokens are usually needed next.
  void compute(const std::vector<float>& worth, int64_t most) {
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
    });
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
  int64_t columns_;
  TokenPanels panels_;
  std::unique_ptr<float[]> elements_, inverse_, tile_;
  std::vector<float*> row_of_;
  std::vector<std::unique_ptr<float[]>> blocks_;
  std::vector<int32_t> order_;
};

// What a token was worth in an earlier step: an upper bound of what it is worth now.
struct Bound {
  float worth;
  int32_t token;
  int32_t step;  // the step that computed it

  // The order of a heap: what is worth most is on top, the first of equal ones.
  bool operator<(const Bound& other) const { return worth != other.worth ? worth < other.worth : token > other.token; }
};

// Takes the best of a heap off it. What tokens are worth only falls, in float32 too, so only those few are looked at
// whose bounds are highest. look_at(bound, rival) lowers a bound; if it stays above the rival, to what it is worth now.
template <class LookAt>
int32_t take_best(std::vector<Bound>& heap, int64_t step, const LookAt& look_at) {
  std::pop_heap(heap.begin(), heap.end());
  while (heap.back().step < step) {
    const Bound none{kTaken, 0, 0};
    heap.back() = look_at(heap.back(), heap.size() > 1 ? heap.front() : none);
    std::push_heap(heap.begin(), heap.end());
    std::pop_heap(heap.begin(), heap.end());
  }
  const int32_t best = heap.back().token;
  heap.pop_back();
  return best;
}

// The distances of one image's tokens, and guesses which tokens are near each other. A distance costs as much as ten
// guesses. Nothing is chosen by a guess: a good one spares distances.
class Distances {
 public:
  Distances(const TokenRows& rows, Dtype dtype) : rows_(rows), dot_(table_.dot[dtype]) {
    const auto up = [](int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; };
    const int64_t padded = up(rows.tokens, table_.sketch_tokens);
    const int64_t words = up(rows.size, table_.sketch_elements) / 4;
    sketch_rows_.reset(new int32_t[padded * words]);
    sketch_panels_.reset(new int32_t[padded * words]);
    sums_.resize(padded);
    inverse_.resize(padded);
    likeliest_.resize(padded);
    guesses_.reset(new int32_t[padded * padded]);
    sketches_ = {rows.tokens, padded, words, sketch_rows_.get(), sketch_panels_.get(), sums_.data(), inverse_.data()};
    const int64_t panels = padded / table_.panel_columns, work = table_.panel_columns * rows.size;
    parallel_rows(panels, row_ranges(panels, work),
                  [&](int64_t begin, int64_t end, int64_t) { table_.sketch[dtype](rows_, sketches_, begin, end); });
    parallel_rows(panels, row_ranges(panels, work * 8), [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i) {  // in turn a short panel and a long one
        table_.guess(sketches_, i % 2 ? panels - 1 - i / 2 : i / 2, guesses_.get());
      }
    });
    table_.likeliest(sketches_, guesses_.get(), likeliest_.data());
  }

  float operator()(int64_t token, int64_t other) const {
    const float both = inverse_[token] * inverse_[other];
    const float cosine = both != 0 ? dot_(rows_.at(token), rows_.at(other), rows_.size) * both : 0.0f;
    const float distance = 1.0f - cosine;
    return distance < kSame ? 0.0f : distance;
  }

  // Returns the token that seems to be nearest to one, or -1 if there is no other.
  int32_t likeliest(int64_t token) const { return likeliest_[token]; }

  // Returns a number that is the higher the nearer two different tokens seem to be.
  int32_t guess(int64_t token, int64_t other) const {
    return guesses_[std::min(token, other) * sketches_.padded + std::max(token, other)];
  }

 private:
  const GreedySelectionKernels& table_ = kernels<GreedySelectionKernels>();
  const TokenRows rows_;
  float (*const dot_)(const char*, const char*, int64_t);
  std::unique_ptr<int32_t[]> sketch_rows_, sketch_panels_, guesses_;
  std::vector<int32_t> sums_, likeliest_;
  std::vector<float> inverse_;
  TokenSketches sketches_;
};

// Finds the token whose nearest other token is farthest: of the distances to some others the least is an upper bound,
// and the token with the highest bound is the one once it has been compared with all others.
int32_t first_farthest(const Distances& distances, const float* weights, int64_t tokens) {
  std::vector<float> nearest(tokens, kLargest), worth(tokens);
  const auto compare = [&](int64_t token, int64_t other) {
    const float distance = distances(token, other);
    for (const int64_t one : {token, other}) nearest[one] = std::min(nearest[one], distance);
  };
  for (int64_t token = 0; token < tokens; ++token) {
    if (distances.likeliest(token) >= 0) compare(token, distances.likeliest(token));
  }
  float known = kTaken;  // what a token that has been compared with all others is worth
  std::vector<bool> is_known(tokens);
  while (true) {
    for (int64_t token = 0; token < tokens; ++token) worth[token] = nearest[token] * weights[token];
    const int64_t best = first_largest(worth);
    if (is_known[best]) return best;
    for (int64_t other = 0; other < tokens && worth[best] >= known; ++other) {
      if (other == best) continue;
      compare(best, other);
      worth[best] = nearest[best] * weights[best];
    }
    is_known[best] = worth[best] >= known;
    known = std::max(known, worth[best]);
  }
}

void choose_farthest(const TokenRows& rows, Dtype dtype, int64_t k, const float* weights, bool first_by_quality,
                     int64_t* positions) {
  const Distances distances(rows, dtype);
  const std::vector<float> alike(first_by_quality ? 0 : rows.tokens, 1.0f);
  std::vector<int32_t> chosen = {first_farthest(distances, first_by_quality ? weights : alike.data(), rows.tokens)};
  std::vector<float> nearest(rows.tokens);
  std::vector<Bound> heap;
  for (int32_t token = 0; token < rows.tokens && k > 1; ++token) {
    if (token == chosen[0]) continue;
    nearest[token] = distances(token, chosen[0]);
    heap.push_back({nearest[token] * weights[token], token, 1});
  }
  std::make_heap(heap.begin(), heap.end());
  // Compares first with the token that seems nearest: mostly no other is needed.
  const auto look_at = [&](Bound bound, const Bound& rival) {
    const auto compare = [&](int32_t other) {
      nearest[bound.token] = std::min(nearest[bound.token], distances(bound.token, other));
      bound.worth = nearest[bound.token] * weights[bound.token];
    };
    const auto begin = chosen.begin() + bound.step, end = chosen.end();
    const auto nearer = [&](int32_t a, int32_t b) {
      return distances.guess(bound.token, a) < distances.guess(bound.token, b);
    };
    const auto first = std::max_element(begin, end, nearer);
    compare(*first);
    for (auto other = begin; other != end && !(bound < rival); ++other) {
      if (other != first) compare(*other);
    }
    if (!(bound < rival)) bound.step = static_cast<int32_t>(chosen.size());
    return bound;
  };
  while (static_cast<int64_t>(chosen.size()) < k) chosen.push_back(take_best(heap, chosen.size(), look_at));
  std::copy(chosen.begin(), chosen.end(), positions);
  std::sort(positions, positions + k);
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
  Cosines cosines(rows, dtype);
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
    const int32_t best =
        take_best(heap, step, [&](const Bound& bound, const Bound&) { return look_at(bound.token, step); });
    positions[step] = best;
    table.cover[similarity.dtype()](similarity.at(image.row, image.first + best), rows, covered.data());
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
