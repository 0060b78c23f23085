// Convolutions and matrix products by the matrix instructions of a CPU (AMX, bfloat16 factors, float32 sums), as XLA
// custom calls. XLA's own CPU backend uses these instructions for plain products alone; a training step spends most of
// its time in convolutions and in the products that are their derivatives.
//
// One idea carries all of it. A picture with a border of zeros is stored as a flat list of pixels, (height + 2) rows of
// (width + 2). A neighbour of pixel n is then pixel n + constant, so each place of a 3x3 kernel is one matrix product
// of consecutive rows of memory, which a tile register loads as they lie. What is computed for the border is dropped.
// A matrix product is the same without a border, with a kernel of one place.

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Half = uint16_t;  // bfloat16

constexpr int kTile = 16;  // rows of a tile register, and float32 numbers in one of its rows
constexpr int kDepth = 32;  // bfloat16 numbers in a row
constexpr int kBlock = 2 * kTile;  // rows and columns that four tiles of sums cover

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

void ConfigureTiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = kTile;
  }
  _tile_loadconfig(&config);
}

// Sets `count` numbers to their bfloat16 roundings and those up to `padded`, a multiple of 32, to zero.
inline void Round(const float* from, Half* to, int64_t count, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kTile) {
    const int64_t left = std::clamp<int64_t>(count - i, 0, kTile);
    const __m512 wide = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), from + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(wide));
  }
}

inline Half RoundOne(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<Half>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

class Buffer {  // of one thread, aligned to a cache line; kept from call to call, so contents are what was left there
 public:
  ~Buffer() { std::free(data_); }
  void Reserve(int64_t bytes) {
    if (bytes <= size_) return;
    std::free(data_);
    size_ = RoundUp(bytes, 4096);
    data_ = std::aligned_alloc(4096, size_);
  }
  void Clear(int64_t bytes) {
    Reserve(bytes);
    std::memset(data_, 0, bytes);
  }
  Half* halves() { return static_cast<Half*>(data_); }
  float* floats() { return static_cast<float*>(data_); }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Swaps the axes of 16 rows of 16 numbers.
inline void Transpose(__m512 rows[kTile]) {
  __m512 t[kTile];
  for (int i = 0; i < kTile; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kTile; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = (__m512d)t[i + j], b = (__m512d)t[i + j + 2];
      rows[i + 2 * j] = (__m512)_mm512_unpacklo_pd(a, b);
      rows[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    }
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

struct Grid {  // where a picture's pixels lie in the flat list
  int64_t height, width, border;
  int64_t row() const { return width + 2 * border; }
  int64_t pixels() const { return (height + 2 * border) * row(); }
  int64_t outputs() const { return height * row(); }  // the last two of each row are dropped
  int64_t side() const { return 2 * border + 1; }
  int64_t places() const { return side() * side(); }
  int64_t offset(int64_t place) const { return place / side() * row() + place % side(); }
};

// Kernels in the order in which tiles read them: (place, block of 32 in, block of 16 out, pair of in, out, 2).
void PackKernel(const float* weight, Half* packed, int64_t places, int64_t in, int64_t out, bool transposed) {
  // The weight is (out, in, places); transposed, its first axis is what is read, and its places are in reverse.
  const int64_t in_padded = RoundUp(in, kDepth), out_padded = RoundUp(out, kBlock);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t place = 0; place < places; ++place) {
    for (int64_t k = 0; k < in; ++k) {
      for (int64_t o = 0; o < out; ++o) {
        const float value = transposed ? weight[(k * out + o) * places + (places - 1 - place)]
                                       : weight[(o * in + k) * places + place];
        const int64_t block = (place * (in_padded / kDepth) + k / kDepth) * (out_padded / kTile) + o / kTile;
        packed[((block * kTile + k % kDepth / 2) * kTile + o % kTile) * 2 + k % 2] = RoundOne(value);
      }
    }
  }
}

ffi::Error Convolve(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight, int64_t border, bool transposed,
                    ffi::ResultBuffer<ffi::F32> result) {
  const auto sizes = x.dimensions();
  const Grid grid{sizes[1], sizes[2], border};
  const int64_t batch = sizes[0], in = sizes[3], out = result->dimensions()[3], places = grid.places();
  const int64_t in_padded = RoundUp(in, kDepth), out_padded = RoundUp(out, kBlock);
  const int64_t depths = in_padded / kDepth, columns = out_padded / kTile;
  static thread_local Buffer kernel_of_thread;
  Buffer& kernel = kernel_of_thread;
  kernel.Clear(places * in_padded * out_padded * 2);
  PackKernel(weight.typed_data(), kernel.halves(), places, in, out, transposed);

#pragma omp parallel
  {
    ConfigureTiles();
    static thread_local Buffer list, sums;
    list.Clear((grid.pixels() + kBlock + 2) * in_padded * 2);
    sums.Reserve(kBlock * kBlock * 4);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      const float* picture = x.typed_data() + b * grid.height * grid.width * in;
      float* made = result->typed_data() + b * grid.height * grid.width * out;
      for (int64_t row = 0; row < grid.height; ++row) {
        for (int64_t column = 0; column < grid.width; ++column) {
          Round(picture + (row * grid.width + column) * in,
                list.halves() + ((row + border) * grid.row() + column + border) * in_padded, in, in_padded);
        }
      }
      for (int64_t n = 0; n < grid.outputs(); n += kBlock) {
        for (int64_t o = 0; o < out_padded; o += kBlock) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
          for (int64_t place = 0; place < places; ++place) {
            const Half* seen = list.halves() + (n + grid.offset(place)) * in_padded;
            const Half* tiles = kernel.halves() + (place * depths * columns + o / kTile) * kTile * kDepth;
            for (int64_t k = 0; k < depths; ++k) {
              _tile_loadd(4, seen + k * kDepth, in_padded * 2);
              _tile_loadd(5, seen + kTile * in_padded + k * kDepth, in_padded * 2);
              _tile_loadd(6, tiles + k * columns * kTile * kDepth, 64);
              _tile_loadd(7, tiles + (k * columns + 1) * kTile * kDepth, 64);
              _tile_dpbf16ps(0, 4, 6);
              _tile_dpbf16ps(1, 4, 7);
              _tile_dpbf16ps(2, 5, 6);
              _tile_dpbf16ps(3, 5, 7);
            }
          }
          float* block = sums.floats();
          _tile_stored(0, block, kBlock * 4);
          _tile_stored(1, block + kTile, kBlock * 4);
          _tile_stored(2, block + kTile * kBlock, kBlock * 4);
          _tile_stored(3, block + kTile * kBlock + kTile, kBlock * 4);
          const int64_t width = std::min<int64_t>(kBlock, out - o);
          for (int64_t i = 0; i < kBlock; ++i) {
            const int64_t row = (n + i) / grid.row(), column = (n + i) % grid.row();
            if (row < grid.height && column < grid.width) {
              std::memcpy(made + (row * grid.width + column) * out + o, block + i * kBlock, width * 4);
            }
          }
        }
      }
    }
    _tile_release();
  }
  return ffi::Error::Success();
}

// The derivative with respect to the kernel: for each place, the sum over pixels of input times output gradient.
ffi::Error KernelGradient(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> gradient, int64_t border,
                          ffi::ResultBuffer<ffi::F32> result) {
  const auto sizes = x.dimensions();
  const Grid grid{sizes[1], sizes[2], border};
  const int64_t batch = sizes[0], in = sizes[3], out = gradient.dimensions()[3], places = grid.places();
  const int64_t in_padded = RoundUp(in, kBlock), out_padded = RoundUp(out, kBlock);
  // Several small pictures at once, so that a tile of sums is loaded and stored once for many products.
  const int64_t at_once = std::clamp<int64_t>(1024 / grid.pixels(), 1, batch);
  const int64_t pixels = RoundUp(at_once * grid.pixels(), kDepth);
  const int64_t length = RoundUp(pixels + grid.offset(places - 1) + 1, kDepth) + kDepth;
  alignas(64) uint16_t order[2 * kTile];
  for (int i = 0; i < 2 * kTile; ++i) order[i] = i / 2 + i % 2 * kTile;
  const __m512i interleaved = _mm512_load_si512(order);
  const int64_t groups = (batch + at_once - 1) / at_once;
  std::memset(result->typed_data(), 0, result->element_count() * 4);

#pragma omp parallel
  {
    ConfigureTiles();
    static thread_local Buffer columns, pairs, sums;
    columns.Clear(in_padded * length * 2);            // (in, pixels)
    pairs.Reserve(pixels * out_padded * 2);           // (pair of pixels, out, 2)
    sums.Clear(places * in_padded * out_padded * 4);  // (place, in, out)
    bool any = false;
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      any = true;
      const int64_t first = group * at_once, count = std::min(at_once, batch - first);
      const auto read = [&](int64_t n) {  // the picture's pixel at a place of the list with its border, or -1
        const int64_t b = n / grid.pixels(), rest = n % grid.pixels();
        const int64_t row = rest / grid.row() - border, column = rest % grid.row() - border;
        const bool inside = b < count && row >= 0 && row < grid.height && column >= 0 && column < grid.width;
        return inside ? ((first + b) * grid.height + row) * grid.width + column : -1;
      };
      const auto written = [&](int64_t n) {
        const int64_t b = n / grid.pixels(), rest = n % grid.pixels();
        const int64_t row = rest / grid.row(), column = rest % grid.row();
        return b < count && row < grid.height && column < grid.width
                   ? ((first + b) * grid.height + row) * grid.width + column
                   : -1;
      };
      for (int64_t n = 0; n < pixels; n += kTile) {
        int64_t pixel[kTile];
        for (int i = 0; i < kTile; ++i) pixel[i] = read(n + i);
        for (int64_t k = 0; k < in; k += kTile) {
          const int64_t some = std::min<int64_t>(kTile, in - k);
          const __mmask16 mask = static_cast<__mmask16>((1u << some) - 1);
          __m512 rows[kTile];
          for (int i = 0; i < kTile; ++i) {
            rows[i] = pixel[i] < 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, x.typed_data() + pixel[i] * in + k);
          }
          Transpose(rows);
          for (int64_t i = 0; i < some; ++i) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns.halves() + (k + i) * length + n),
                                (__m256i)_mm512_cvtneps_pbh(rows[i]));
          }
        }
      }
      for (int64_t n = 0; n < pixels; n += 2) {
        const int64_t pixel[2] = {written(n), written(n + 1)};
        for (int64_t o = 0; o < out_padded; o += kTile) {
          const __mmask16 mask = static_cast<__mmask16>((1u << std::clamp<int64_t>(out - o, 0, kTile)) - 1);
          __m512 values[2];
          for (int i = 0; i < 2; ++i) {
            values[i] = pixel[i] < 0 ? _mm512_setzero_ps()
                                     : _mm512_maskz_loadu_ps(mask, gradient.typed_data() + pixel[i] * out + o);
          }
          const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]);
          _mm512_storeu_si512(pairs.halves() + n * out_padded + 2 * o, _mm512_permutexvar_epi16(interleaved, both));
        }
      }
      for (int64_t place = 0; place < places; ++place) {
        for (int64_t k = 0; k < in_padded; k += kBlock) {
          for (int64_t o = 0; o < out_padded; o += kBlock) {
            float* block = sums.floats() + (place * in_padded + k) * out_padded + o;
            const int64_t stride = out_padded * 4;
            _tile_loadd(0, block, stride);
            _tile_loadd(1, block + kTile, stride);
            _tile_loadd(2, block + kTile * out_padded, stride);
            _tile_loadd(3, block + kTile * out_padded + kTile, stride);
            const Half* seen = columns.halves() + k * length + grid.offset(place);
            const Half* errors = pairs.halves() + o * 2;
            for (int64_t n = 0; n < pixels; n += kDepth) {
              _tile_loadd(4, seen + n, length * 2);
              _tile_loadd(5, seen + kTile * length + n, length * 2);
              _tile_loadd(6, errors + n * out_padded, out_padded * 4);
              _tile_loadd(7, errors + n * out_padded + kDepth, out_padded * 4);
              _tile_dpbf16ps(0, 4, 6);
              _tile_dpbf16ps(1, 4, 7);
              _tile_dpbf16ps(2, 5, 6);
              _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, block, stride);
            _tile_stored(1, block + kTile, stride);
            _tile_stored(2, block + kTile * out_padded, stride);
            _tile_stored(3, block + kTile * out_padded + kTile, stride);
          }
        }
      }
    }
    _tile_release();
    // Threads add up in order, so that the same work gives the same sums.
#pragma omp for ordered schedule(static, 1)
    for (int thread = 0; thread < omp_get_num_threads(); ++thread) {
#pragma omp ordered
      if (any) {
        for (int64_t o = 0; o < out; ++o) {
          for (int64_t k = 0; k < in; ++k) {
            for (int64_t place = 0; place < places; ++place) {
              result->typed_data()[(o * in + k) * places + place] +=
                  sums.floats()[(place * in_padded + k) * out_padded + o];
            }
          }
        }
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SdjaxConvolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("border")
                                  .Attr<bool>("transposed")
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SdjaxKernelGradient, KernelGradient,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("border")
                                  .Ret<ffi::Buffer<ffi::F32>>());

// Asks the system for the tile registers; returns whether this process may use them.
extern "C" int sdjax_allow_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
