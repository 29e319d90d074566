// Intel's tile registers: 8 of 16 rows of 64 bytes. One instruction adds the products of 16 x 32 bfloat16, rows of A,
// and 16 x 16 pairs, steps of B, to 16 x 16 float32. Where a source is compiled for other sets, there are none.
//
// Not the compiler's intrinsics: g++ 12's do not say that they read memory.
#pragma once

#include "isa.h"

namespace gpt2 {
namespace GPT2_ISA {
#if defined(__AMX_BF16__)
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
struct TileRegisters {};  // what a thread makes before its first tile
#endif
}  // namespace GPT2_ISA
}  // namespace gpt2

#if defined(__AMX_BF16__)

#define GPT2_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(stride)) : "memory")
#define GPT2_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(stride)) : "memory")
#define GPT2_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile : :)
#define GPT2_TILE_MULTIPLY(sum, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : :)

namespace gpt2 {
namespace GPT2_ISA {
namespace {

constexpr int64_t TILE_ROWS = 16, TILE_UNITS = 16;  // of a register: rows, and units of 4 bytes in a row

// All registers at their full size for as long as this lives. What another library's call left is there again after it.
class TileRegisters {
 public:
  TileRegisters() {
    Shapes shapes{};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = TILE_UNITS * 4, shapes.rows[i] = TILE_ROWS;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~TileRegisters() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  TileRegisters(const TileRegisters&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Shapes before_;
};

}  // namespace
}  // namespace GPT2_ISA
}  // namespace gpt2
#endif
