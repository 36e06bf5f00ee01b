// Tiles of scores S = X Y^T between rows of two matrices (N,D), for kernels that walk over attention without storing it.
//
// A block of threads keeps `kStationary` rows of X for a long time and meets `kMoving` rows of Y at a time in one of two
// shared buffers, the other being filled meanwhile. scores() gives each thread kRows x kColumns elements of S: rows row(i)
// of X, columns column(j) of the 32 rows of Y that begin at `column0`. Four neighbouring lanes (lane / 4 equal) hold the
// same rows, so that a sum over Y is a sum in registers and then over those lanes.
//
//   MmaTile  16-bit or TF32 products on the tensor cores. X lives in registers: each warp reads only Y from shared memory,
//            128 bytes per mma, which the shared memory can deliver faster than the tensor cores consume.
//   FmaTile  exact f32 and f64 products. X and Y are in shared memory, each thread computes kRows x 8 sums.
//
// Shared rows are cut into 16-byte chunks; chunk c of row r lies at place c ^ (r mod 8), so that eight rows read at the same
// chunk fall into different banks.
#pragma once
#include "numeric.cuh"

namespace xai {

constexpr int kTileWarps = 4;
constexpr int kTileThreads = kTileWarps * kWarp;
constexpr int kScoreColumns = 32;  // columns of Y per call of scores()

// Rows of a matrix (N,D) of T. `aligned`: rows start at multiples of 16 bytes and D fills whole chunks.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int dim;
  bool aligned;
};

__device__ inline int lane_row() { return threadIdx.x % kWarp / 4; }     // g in mma.cuh
__device__ inline int lane_column() { return threadIdx.x % kWarp % 4; }  // t in mma.cuh

__device__ inline char* chunk_address(char* tile, int row, int chunk, int pitch) {
  return tile + (row * pitch + (chunk ^ (row % 8))) * kPieceBytes;
}

// The chunks of a tile that one thread copies: eight neighbouring threads share a row, so a warp reads whole 128-byte lines,
// and a thread's place in the swizzle is the same in all its rows.
struct OwnChunks {
  static constexpr int kFirstStep = 8, kRowStep = kTileThreads / kFirstStep;
  static_assert(kRowStep % 8 == 0, "row mod 8, and with it the swizzle, must not change");
  int first = threadIdx.x % kFirstStep, row = threadIdx.x / kFirstStep;
  __device__ char* address(char* tile, int pitch) const { return chunk_address(tile, row, first, pitch); }
};

template <class T, class Valid>
__device__ void load_tile_async(char* tile, int rows, int chunks, int pitch, Rows<T> x, Valid valid) {
#pragma unroll 4
  for (OwnChunks own; own.row < rows; own.row += OwnChunks::kRowStep) {
    const bool inside = valid(own.row);
    const T* row = x.data + (inside ? own.row * x.stride : 0);
    char* destination = own.address(tile, pitch);
    for (int chunk = own.first; chunk < chunks; chunk += OwnChunks::kFirstStep) {
      const int column = chunk * kPiece<T>;
      copy_async_16(destination, column < x.dim ? row + column : x.data, inside && column < x.dim);
      destination += OwnChunks::kFirstStep * kPieceBytes;
    }
  }
}

template <class T, class Valid>
__device__ void load_tile_by_element(char* tile, int rows, int chunks, int pitch, Rows<T> x, Valid valid) {
#pragma unroll 1
  for (OwnChunks own; own.row < rows; own.row += OwnChunks::kRowStep) {
    const int dim = valid(own.row) ? x.dim : 0;
    const T* row = x.data + own.row * x.stride;
#pragma unroll 1
    for (int chunk = own.first; chunk < chunks; chunk += OwnChunks::kFirstStep) {
      const int column = chunk * kPiece<T>;
      T piece[kPiece<T>];
#pragma unroll
      for (int e = 0; e < kPiece<T>; ++e) piece[e] = column + e < dim ? row[column + e] : T(0.0f);
      store_piece(reinterpret_cast<T*>(chunk_address(tile, own.row, chunk, pitch)), piece);
    }
  }
}

// tile[r] = x[r] for r < rows, in `chunks` chunks a row; zeros where valid(r) is false and beyond D.
template <class T, class Valid>
__device__ void load_tile(char* tile, int rows, int chunks, int pitch, Rows<T> x, Valid valid) {
  if (x.aligned)
    load_tile_async(tile, rows, chunks, pitch, x, valid);
  else
    load_tile_by_element(tile, rows, chunks, pitch, x, valid);
}

__device__ inline void round_chunk_to_tf32(char* address) {
  uint32_t piece[4];
  load_piece(reinterpret_cast<const uint32_t*>(address), piece);
#pragma unroll
  for (uint32_t& word : piece) word = round_to_tf32(word);
  store_piece(reinterpret_cast<uint32_t*>(address), piece);
}

// T: __half, __nv_bfloat16 or float (as TF32). K_STEPS: steps of 32 bytes of D, ROW_TILES: 16-row tiles of X per warp.
// SKIP_STEPS tests each step against D, so that one instance serves every D; otherwise rows are padded to K_STEPS.
template <class T, int K_STEPS, int ROW_TILES, int MOVING, bool SKIP_STEPS = false>
class MmaTile {
 public:
  using Element = T;
  using Acc = float;
  static constexpr int kRows = 2 * ROW_TILES, kColumns = 8;
  static constexpr int kWarpRows = 16 * ROW_TILES, kStationary = kTileWarps * kWarpRows, kMoving = MOVING;
  static constexpr int kBlocksPerMultiprocessor = K_STEPS * ROW_TILES > 16 ? 1 : 3;
  static_assert(kStationary <= 2 * kMoving, "X passes through the two buffers on its way to the registers");

  static __host__ __device__ size_t shared_bytes(int) { return 2 * kBufferBytes; }

  __device__ MmaTile(char* shared, int dim)
      : buffers_(shared), steps_(SKIP_STEPS ? (dim * int(sizeof(T)) + 31) / 32 : K_STEPS) {}

  static __device__ int row(int i) { return warp_index() * kWarpRows + i * 8 + lane_row(); }
  static __device__ int column(int j) { return j / 2 * 8 + 2 * lane_column() + j % 2; }
  // values[column(j)] for each j; `values` is 8-byte aligned.
  static __device__ void gather_columns(const float* values, float (&gathered)[kColumns]) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      const void* pair = values + column(j);
      memcpy(&gathered[j], __builtin_assume_aligned(pair, 8), 8);
    }
  }

  // Ends with the buffers free. All threads must have finished with the buffers before.
  template <class Valid>
  __device__ void load_stationary(Rows<T> x, Valid valid) {
    load_tile(buffers_, kStationary, 2 * steps_, kPitch, x, valid);
    finish_copies(buffers_, kStationary);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) {
        if (k >= steps_) break;
        const int lane = threadIdx.x % kWarp;
        const int row = (warp_index() * ROW_TILES + m) * 16 + lane % 16;
        ldmatrix_x4(stationary_[m][k], chunk_address(buffers_, row, 2 * k + lane / 16, kPitch));
      }
    __syncthreads();
  }

  template <class Valid>
  __device__ void load_moving(int buffer, Rows<T> y, Valid valid) {
    load_tile(buffers_ + buffer * kBufferBytes, kMoving, 2 * steps_, kPitch, y, valid);
  }
  // Afterwards every thread sees the buffer, and the other buffer is free to be filled.
  __device__ void wait_moving(int buffer) {
    finish_copies(buffers_ + buffer * kBufferBytes, kMoving);
    __syncthreads();
  }

  __device__ void scores(int buffer, int column0, float (&s)[kRows][kColumns]) const {
    float d[ROW_TILES][kColumns / 2][4] = {};
    const char* tile = buffers_ + buffer * kBufferBytes;
    const int lane = threadIdx.x % kWarp;
    const int row = (column0 + lane / 16 * 8 + lane % 8) * kPitch, place = lane / 8 % 2 ^ lane % 8;
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      if (k >= steps_) break;
      // chunk_address() of chunk 2 k + lane / 8 % 2, with little left to compute in the loop
      const char* fragments = tile + (row + (place ^ 2 * k)) * kPieceBytes;
#pragma unroll
      for (int n = 0; n < kColumns / 2; n += 2) {
        uint32_t y[4];  // two 8-column fragments
        ldmatrix_x4(y, fragments + n * 8 * kPitch * kPieceBytes);
        const uint32_t first[2] = {y[0], y[1]}, second[2] = {y[2], y[3]};
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma<T>(d[m][n], stationary_[m][k], first);
          mma<T>(d[m][n + 1], stationary_[m][k], second);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) s[i][j] = d[i / 2][j / 2][i % 2 * 2 + j % 2];
  }

 private:
  static constexpr int kPitch = 2 * K_STEPS;  // chunks
  static constexpr int kBufferBytes = kMoving * kPitch * kPieceBytes;
  static_assert(kPitch % 8 == 0, "the swizzle permutes groups of eight chunks");

  // Waits for this thread's copies and rounds them to TF32, once here instead of at each use.
  __device__ void finish_copies(char* tile, int rows) {
    copy_async_wait();
    if constexpr (sizeof(T) == 4)
      for (OwnChunks own; own.row < rows; own.row += OwnChunks::kRowStep) {
        char* address = own.address(tile, kPitch);
        for (int chunk = own.first; chunk < 2 * steps_; chunk += OwnChunks::kFirstStep) {
          round_chunk_to_tf32(address);
          address += OwnChunks::kFirstStep * kPieceBytes;
        }
      }
  }

  char* buffers_;
  int steps_;
  uint32_t stationary_[ROW_TILES][K_STEPS][4];
};

template <class T, int ROWS>
class FmaTile {
 public:
  using Element = T;
  using Acc = T;
  static constexpr int kRows = ROWS, kColumns = 8;
  static constexpr int kWarpRows = 8 * ROWS, kStationary = kTileWarps * kWarpRows, kMoving = kScoreColumns;
  static constexpr int kBlocksPerMultiprocessor = 2;

  static __host__ __device__ size_t shared_bytes(int dim) {
    return size_t(kStationary + 2 * kMoving) * pitch(chunks(dim)) * kPieceBytes;
  }

  __device__ FmaTile(char* shared, int dim)
      : chunks_(chunks(dim)),
        pitch_(pitch(chunks_)),
        stationary_(shared),
        buffers_(shared + kStationary * pitch_ * kPieceBytes) {}

  static __device__ int row(int i) { return warp_index() * kWarpRows + i * 8 + lane_row(); }
  static __device__ int column(int j) { return j * 4 + lane_column(); }
  static __device__ void gather_columns(const T* values, T (&gathered)[kColumns]) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) gathered[j] = values[column(j)];
  }

  template <class Valid>
  __device__ void load_stationary(Rows<T> x, Valid valid) {
    load_tile(stationary_, kStationary, chunks_, pitch_, x, valid);
  }
  template <class Valid>
  __device__ void load_moving(int buffer, Rows<T> y, Valid valid) {
    load_tile(moving(buffer), kMoving, chunks_, pitch_, y, valid);
  }
  __device__ void wait_moving(int) {
    copy_async_wait();
    __syncthreads();
  }

  __device__ void scores(int buffer, int column0, T (&s)[kRows][kColumns]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) s[i][j] = 0;
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      T x[kRows][kPiece<T>];
#pragma unroll
      for (int i = 0; i < kRows; ++i) read(stationary_, row(i), chunk, x[i]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        T y[kPiece<T>];
        read(moving(buffer), column0 + column(j), chunk, y);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int e = 0; e < kPiece<T>; ++e) s[i][j] += x[i][e] * y[e];
      }
    }
  }

 private:
  static __host__ __device__ int chunks(int dim) { return (dim + kPiece<T> - 1) / kPiece<T>; }
  static __host__ __device__ int pitch(int chunks) { return (chunks + 7) / 8 * 8; }
  __device__ char* moving(int buffer) const { return buffers_ + buffer * kMoving * pitch_ * kPieceBytes; }
  __device__ void read(char* tile, int row, int chunk, T (&piece)[kPiece<T>]) const {
    load_piece(reinterpret_cast<const T*>(chunk_address(tile, row, chunk, pitch_)), piece);
  }

  int chunks_, pitch_;
  char* stationary_;
  char* buffers_;
};

}  // namespace xai
