// From codes to the registers of an A fragment: 8 weights a lane, as halves that hold the codes' values exactly (before
// the scale). A code is put into the mantissa of a half whose exponent makes the code's lowest bit worth 1, and that
// half's own value is taken off again: 1024 + c where c lies in bits 0-3 (0-7 for bytes), 64 + c where it lies in bits
// 4-7. tests/cuda/test_fragments.py runs every code through here. No scales: see linear_few.cuh.
#pragma once

#include "cuda/device.h"

namespace pyllama {
namespace cuda {

// (a & b) | c
PYLLAMA_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return lop3<(0xf0 & 0xcc) | 0xaa>(a, b, c); }

// -1032 and -72 are 1024 and 64 with the 8 that q4 takes off its codes; -1152 is 1024 with the 128 added to bytes.
constexpr uint32_t kMinus1024 = 0xe400e400, kMinus64 = 0xd400d400;
constexpr uint32_t kMinus1032 = 0xe408e408, kMinus72 = 0xd480d480, kMinus1152 = 0xe480e480;

// What to add to (1024 + code) of row g and to (64 + code) of row g + 8.
struct CodeBias {
  half2 low, high;
};

// c + bias, of a word of Codes::q4. 9 instructions.
PYLLAMA_DEVICE void fragment_q4(uint32_t (&a)[4], uint32_t word, const CodeBias& bias) {
  const uint32_t next = word >> 8;
  a[0] = as_bits(add(as_half2(and_or(word, 0x000f000f, 0x64006400)), bias.low));
  a[1] = as_bits(add(as_half2(and_or(word, 0x00f000f0, 0x54005400)), bias.high));
  a[2] = as_bits(add(as_half2(and_or(next, 0x000f000f, 0x64006400)), bias.low));
  a[3] = as_bits(add(as_half2(and_or(next, 0x00f000f0, 0x54005400)), bias.high));
}

// Bytes 0 and 1, or 2 and 3, of a word, less 128.
PYLLAMA_DEVICE uint32_t low_bytes(uint32_t word) {
  return as_bits(add(as_half2(permute_bytes(word, 0x64646464, 0x4140)), as_half2(kMinus1152)));
}
PYLLAMA_DEVICE uint32_t high_bytes(uint32_t word) {
  return as_bits(add(as_half2(permute_bytes(word, 0x64646464, 0x4342)), as_half2(kMinus1152)));
}

// c - 128, of two words of Codes::q8. 8 instructions.
PYLLAMA_DEVICE void fragment_q8(uint32_t (&a)[4], uint32_t word0, uint32_t word1) {
  a[0] = low_bytes(word0);
  a[1] = high_bytes(word0);
  a[2] = low_bytes(word1);
  a[3] = high_bytes(word1);
}

// codebook[c], of a word of Codes::q4nl. A byte permutation looks four nibbles up in eight entries; a nibble's highest
// bit then picks from the lower or the upper eight. 19 instructions.
PYLLAMA_DEVICE void fragment_q4nl(uint32_t (&a)[4], uint32_t word, const uint32_t (&codebook)[4]) {
  const uint32_t index = word & 0x77777777;
  const uint32_t half_of_book = and_or(word >> 1, 0x44444444, 0x32103210);
  const uint32_t low = permute_bytes(permute_bytes(codebook[0], codebook[1], index),
                                     permute_bytes(codebook[2], codebook[3], index), half_of_book);
  const uint32_t index2 = index >> 16, half_of_book2 = half_of_book >> 16;
  const uint32_t high = permute_bytes(permute_bytes(codebook[0], codebook[1], index2),
                                      permute_bytes(codebook[2], codebook[3], index2), half_of_book2);
  a[0] = low_bytes(low);
  a[1] = high_bytes(low);
  a[2] = low_bytes(high);
  a[3] = high_bytes(high);
}

}  // namespace cuda
}  // namespace pyllama
