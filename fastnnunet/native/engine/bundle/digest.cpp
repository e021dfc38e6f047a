#include "bundle/digest.hpp"

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define FASTNNUNET_SHA_INSTRUCTIONS
#endif

namespace fastnnunet::engine {
namespace {

using State = std::array<std::uint32_t, 8>;

constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t rotate(std::uint32_t value, int by) { return value >> by | value << (32 - by); }

void blocks_plainly(State& state, const unsigned char* data, std::size_t count) {
    for (; count > 0; --count, data += 64) {
        std::uint32_t w[64];
        for (int i = 0; i < 16; ++i) {
            w[i] = std::uint32_t{data[4 * i]} << 24 | data[4 * i + 1] << 16 | data[4 * i + 2] << 8 | data[4 * i + 3];
        }
        for (int i = 16; i < 64; ++i) {
            const std::uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
            const std::uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        auto [a, b, c, d, e, f, g, h] = state;
        for (int i = 0; i < 64; ++i) {
            const std::uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
            const std::uint32_t one = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
            const std::uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
            const std::uint32_t two = s0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + one;
            d = c;
            c = b;
            b = a;
            a = one + two;
        }
        const std::uint32_t more[] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; ++i) state[i] += more[i];
    }
}

#ifdef FASTNNUNET_SHA_INSTRUCTIONS
bool has_instructions() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3)) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
}

__attribute__((target("sha,sse4.1,ssse3"))) void blocks_by_instructions(State& state, const unsigned char* data,
                                                                        std::size_t count) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    const auto* words = reinterpret_cast<const __m128i*>(state.data());
    __m128i low = _mm_shuffle_epi32(_mm_loadu_si128(words), 0xB1);       // c d a b
    __m128i high = _mm_shuffle_epi32(_mm_loadu_si128(words + 1), 0x1B);  // e f g h
    __m128i abef = _mm_alignr_epi8(low, high, 8);
    __m128i cdgh = _mm_blend_epi16(high, low, 0xF0);
    for (; count > 0; --count, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; ++i) {
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 16 * i)), swap);
        }
        for (int step = 0; step < 16; ++step) {
            const auto* constants = reinterpret_cast<const __m128i*>(kRound + 4 * step);
            __m128i now = _mm_add_epi32(w[0], _mm_loadu_si128(constants));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, now);
            now = _mm_shuffle_epi32(now, 0x0E);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, now);
            // the schedule's next four words; those after the last are not used
            __m128i next = _mm_sha256msg1_epu32(w[0], w[1]);
            next = _mm_add_epi32(next, _mm_alignr_epi8(w[3], w[2], 4));
            next = _mm_sha256msg2_epu32(next, w[3]);
            w[0] = w[1];
            w[1] = w[2];
            w[2] = w[3];
            w[3] = next;
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    low = _mm_shuffle_epi32(abef, 0x1B);   // f e b a reversed: a b e f
    high = _mm_shuffle_epi32(cdgh, 0xB1);  // g h c d
    auto* out = reinterpret_cast<__m128i*>(state.data());
    _mm_storeu_si128(out, _mm_blend_epi16(low, high, 0xF0));
    _mm_storeu_si128(out + 1, _mm_alignr_epi8(high, low, 8));
}
#endif

void blocks(State& state, const unsigned char* data, std::size_t count) {
#ifdef FASTNNUNET_SHA_INSTRUCTIONS
    static const bool by_instructions = has_instructions();
    if (by_instructions) return blocks_by_instructions(state, data, count);
#endif
    blocks_plainly(state, data, count);
}

template <class Blocks>
std::string digest(const void* bytes, std::size_t count, const Blocks& blocks) {
    State state{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const auto* data = static_cast<const unsigned char*>(bytes);
    blocks(state, data, count / 64);
    unsigned char last[128] = {};
    const std::size_t rest = count % 64, size = rest < 56 ? 64 : 128;
    if (rest > 0) std::memcpy(last, data + (count - rest), rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; ++i) last[size - 1 - i] = static_cast<unsigned char>(std::uint64_t{count} * 8 >> 8 * i);
    blocks(state, last, size / 64);
    std::string text;
    for (const std::uint32_t word : state) {
        for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
    }
    return text;
}

}  // namespace

std::string sha256_hex(const void* bytes, std::size_t count) { return digest(bytes, count, blocks); }

std::string sha256_hex_plainly(const void* bytes, std::size_t count) { return digest(bytes, count, blocks_plainly); }

}  // namespace fastnnunet::engine
