// Group normalisation of pictures, channels last, and its derivative, each in two passes over a picture that stays in the
// cache. XLA's CPU backend makes a dozen passes over all pictures of a batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Numbers = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

struct Group {
  float mean, scale;  // scale: one over the standard deviation
};

// Mean and scale of each group, from each channel's sum and sum of squares over the pixels.
void FindGroups(const std::vector<double>& sum, const std::vector<double>& squares, int64_t pixels, int64_t groups,
                double epsilon, std::vector<Group>& found) {
  const int64_t width = static_cast<int64_t>(sum.size()) / groups;
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0, total_squares = 0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      total += sum[c];
      total_squares += squares[c];
    }
    const double count = static_cast<double>(pixels * width), mean = total / count;
    found[group] = {static_cast<float>(mean),
                    static_cast<float>(1 / std::sqrt(std::max(total_squares / count - mean * mean, 0.0) + epsilon))};
  }
}

// x: (batch, pixels, channels); weight, bias: (channels).
ffi::Error Normalise(Numbers x, Numbers weight, Numbers bias, int64_t groups, double epsilon, Result result) {
  const auto sizes = x.dimensions();
  const int64_t batch = sizes[0], pixels = sizes[1], channels = sizes[2], width = channels / groups;
  const float *w = weight.typed_data(), *shift = bias.typed_data();
#pragma omp parallel
  {
    std::vector<float> part(channels), part_squares(channels), factor(channels), offset(channels);
    std::vector<double> sum(channels), squares(channels);
    std::vector<Group> found(groups);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      const float* read = x.typed_data() + b * pixels * channels;
      float* written = result->typed_data() + b * pixels * channels;
      std::fill(sum.begin(), sum.end(), 0.0);
      std::fill(squares.begin(), squares.end(), 0.0);
      for (int64_t first = 0; first < pixels; first += 64) {  // short sums in float32, long ones in float64
        std::fill(part.begin(), part.end(), 0.0f);
        std::fill(part_squares.begin(), part_squares.end(), 0.0f);
        for (int64_t n = first; n < std::min(first + 64, pixels); ++n) {
          const float* pixel = read + n * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            part[c] += pixel[c];
            part_squares[c] += pixel[c] * pixel[c];
          }
        }
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += part[c];
          squares[c] += part_squares[c];
        }
      }
      FindGroups(sum, squares, pixels, groups, epsilon, found);
      for (int64_t c = 0; c < channels; ++c) {
        factor[c] = found[c / width].scale * w[c];
        offset[c] = shift[c] - found[c / width].mean * factor[c];
      }
      for (int64_t n = 0; n < pixels; ++n) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          written[n * channels + c] = read[n * channels + c] * factor[c] + offset[c];
        }
      }
    }
  }
  return ffi::Error::Success();
}

// The derivatives with respect to x, and, one row a picture, to weight and bias: (batch, channels) each.
ffi::Error NormaliseGradient(Numbers x, Numbers weight, Numbers gradient, int64_t groups, double epsilon, Result by_x,
                             Result by_weight, Result by_bias) {
  const auto sizes = x.dimensions();
  const int64_t batch = sizes[0], pixels = sizes[1], channels = sizes[2], width = channels / groups;
  const float* w = weight.typed_data();
#pragma omp parallel
  {
    std::vector<float> part(4 * channels), factor(channels), slope(channels), offset(channels);
    std::vector<double> sum(channels), squares(channels), errors(channels), products(channels);
    std::vector<Group> found(groups);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      const float* read = x.typed_data() + b * pixels * channels;
      const float* error = gradient.typed_data() + b * pixels * channels;
      float* written = by_x->typed_data() + b * pixels * channels;
      for (auto* sums : {&sum, &squares, &errors, &products}) std::fill(sums->begin(), sums->end(), 0.0);
      for (int64_t first = 0; first < pixels; first += 64) {
        std::fill(part.begin(), part.end(), 0.0f);
        float *p0 = part.data(), *p1 = p0 + channels, *p2 = p1 + channels, *p3 = p2 + channels;
        for (int64_t n = first; n < std::min(first + 64, pixels); ++n) {
          const float *pixel = read + n * channels, *wrong = error + n * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            p0[c] += pixel[c];
            p1[c] += pixel[c] * pixel[c];
            p2[c] += wrong[c];
            p3[c] += wrong[c] * pixel[c];
          }
        }
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += p0[c];
          squares[c] += p1[c];
          errors[c] += p2[c];
          products[c] += p3[c];
        }
      }
      FindGroups(sum, squares, pixels, groups, epsilon, found);
      const double count = static_cast<double>(pixels * width);
      for (int64_t group = 0; group < groups; ++group) {
        const double mean = found[group].mean, scale = found[group].scale;
        double along = 0, across = 0;  // means of the weighted errors, and of those times the normalised input
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
          const double normalised = scale * (products[c] - mean * errors[c]);
          by_weight->typed_data()[b * channels + c] = static_cast<float>(normalised);
          by_bias->typed_data()[b * channels + c] = static_cast<float>(errors[c]);
          along += w[c] * errors[c] / count;
          across += w[c] * normalised / count;
        }
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
          factor[c] = static_cast<float>(scale * w[c]);
          slope[c] = static_cast<float>(-scale * scale * across);
          offset[c] = static_cast<float>(scale * scale * across * mean - scale * along);
        }
      }
      for (int64_t n = 0; n < pixels; ++n) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t i = n * channels + c;
          written[i] = factor[c] * error[i] + slope[c] * read[i] + offset[c];
        }
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SdjaxNormalise, Normalise,
                              ffi::Ffi::Bind()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Attr<int64_t>("groups")
                                  .Attr<double>("epsilon")
                                  .Ret<Numbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SdjaxNormaliseGradient, NormaliseGradient,
                              ffi::Ffi::Bind()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Attr<int64_t>("groups")
                                  .Attr<double>("epsilon")
                                  .Ret<Numbers>()
                                  .Ret<Numbers>()
                                  .Ret<Numbers>());
