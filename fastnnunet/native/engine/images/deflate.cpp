// Format: https://www.rfc-editor.org/rfc/rfc1951 (deflate), rfc1950 (zlib), rfc1952 (gzip)

#include "deflate.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <queue>
#include <utility>

#include "libdeflate.h"

namespace fastnnunet::images {
namespace {

constexpr std::size_t kShortest = 3, kLongest = 258, kFarthest = 32768;
constexpr std::size_t kTokens = 1 << 15;  // of a block, which has a code of its own
constexpr int kEndOfBlock = 256, kFirstLength = 257;
constexpr int kLiterals = 286, kDistances = 30, kLengthCodes = 19;

// Codes of lengths and distances: the first value of each, and how many bits more tell which
struct Range {
    std::uint16_t first;
    std::uint8_t bits;
};
constexpr std::array<Range, 29> kLengths{{
    {3, 0},  {4, 0},  {5, 0},  {6, 0},  {7, 0},  {8, 0},  {9, 0},  {10, 0},  {11, 1},  {13, 1},
    {15, 1}, {17, 1}, {19, 2}, {23, 2}, {27, 2}, {31, 2}, {35, 3}, {43, 3},  {51, 3},  {59, 3},
    {67, 4}, {83, 4}, {99, 4}, {115, 4}, {131, 5}, {163, 5}, {195, 5}, {227, 5}, {258, 0},
}};
constexpr std::array<Range, kDistances> kDistanceRanges{{
    {1, 0},     {2, 0},     {3, 0},     {4, 0},      {5, 1},      {7, 1},      {9, 2},     {13, 2},
    {17, 3},    {25, 3},    {33, 4},    {49, 4},     {65, 5},     {97, 5},     {129, 6},   {193, 6},
    {257, 7},   {385, 7},   {513, 8},   {769, 8},    {1025, 9},   {1537, 9},   {2049, 10}, {3073, 10},
    {4097, 11}, {6145, 11}, {8193, 12}, {12289, 12}, {16385, 13}, {24577, 13},
}};

template <std::size_t N>
int code_of(const std::array<Range, N>& ranges, std::size_t value) {
    const auto after = std::upper_bound(ranges.begin(), ranges.end(), value,
                                        [](std::size_t v, const Range& range) { return v < range.first; });
    return static_cast<int>(after - ranges.begin()) - 1;
}

// A byte where `length` is 0, else a repetition; of one of two distances
struct Token {
    std::uint16_t length;
    std::uint8_t byte;
    bool is_row;
};

class Bits {
public:
    explicit Bits(std::vector<std::uint8_t>& out) : out_(out) {}

    void put(std::uint64_t value, int count) {  // lowest first
        held_ |= value << filled_;
        filled_ += count;
        while (filled_ >= 8) {
            out_.push_back(static_cast<std::uint8_t>(held_));
            held_ >>= 8;
            filled_ -= 8;
        }
    }
    void finish() {
        if (filled_ > 0) put(0, 8 - filled_);
    }

private:
    std::vector<std::uint8_t>& out_;
    std::uint64_t held_ = 0;
    int filled_ = 0;
};

// A Huffman code whose words have at most `longest` bits
class Code {
public:
    Code(std::vector<std::uint32_t> counts, int longest) : lengths_(counts.size(), 0), words_(counts.size(), 0) {
        while (!try_lengths(counts, longest)) {
            for (auto& count : counts) count = (count + 1) / 2;  // flatter, until it fits
        }
        std::array<std::uint32_t, 16> next{};
        std::array<int, 17> used{};
        for (const auto length : lengths_) used[length] += length > 0;
        std::uint32_t word = 0;
        for (int length = 1; length < 16; ++length) {
            word = (word + used[length - 1]) << 1;
            next[length] = word;
        }
        for (std::size_t i = 0; i < lengths_.size(); ++i) {
            if (lengths_[i] > 0) words_[i] = reversed(next[lengths_[i]]++, lengths_[i]);
        }
    }

    int length(int symbol) const { return lengths_[symbol]; }
    void put(Bits& bits, int symbol) const { bits.put(words_[symbol], lengths_[symbol]); }

private:
    bool try_lengths(const std::vector<std::uint32_t>& counts, int longest) {
        using Entry = std::pair<std::uint64_t, int>;  // count, node
        std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> rest;
        std::vector<int> parents;
        std::vector<std::size_t> symbols;
        for (std::size_t i = 0; i < counts.size(); ++i) {
            if (counts[i] == 0) continue;
            rest.push({counts[i], static_cast<int>(parents.size())});
            parents.push_back(-1);
            symbols.push_back(i);
        }
        while (rest.size() > 1) {
            const Entry a = rest.top();
            rest.pop();
            const Entry b = rest.top();
            rest.pop();
            const int node = static_cast<int>(parents.size());
            parents[a.second] = parents[b.second] = node;
            parents.push_back(-1);
            rest.push({a.first + b.first, node});
        }
        for (std::size_t i = 0; i < symbols.size(); ++i) {
            int depth = 0;
            for (int node = parents[i]; node >= 0; node = parents[node]) ++depth;
            if (depth > longest) return false;
            lengths_[symbols[i]] = static_cast<std::uint8_t>(depth);
        }
        return true;
    }

    static std::uint32_t reversed(std::uint32_t word, int count) {
        std::uint32_t out = 0;
        for (int i = 0; i < count; ++i) out |= ((word >> i) & 1u) << (count - 1 - i);
        return out;
    }

    std::vector<std::uint8_t> lengths_;
    std::vector<std::uint32_t> words_;
};

std::size_t common(const std::uint8_t* a, const std::uint8_t* b, std::size_t most) {
    std::size_t length = 0;
    for (; length + 8 <= most; length += 8) {
        std::uint64_t x, y;
        std::memcpy(&x, a + length, 8);
        std::memcpy(&y, b + length, 8);
        if (x != y) break;
    }
    while (length < most && a[length] == b[length]) ++length;
    return length;
}

void put_block(const std::vector<Token>& tokens, bool is_last, std::size_t voxel_bytes, std::size_t row_bytes,
               Bits& bits) {
    const std::array<int, 2> distance_code{code_of(kDistanceRanges, voxel_bytes), code_of(kDistanceRanges, row_bytes)};
    std::array<std::uint8_t, kLongest + 1> length_code{};
    for (std::size_t length = kShortest; length <= kLongest; ++length) {
        length_code[length] = static_cast<std::uint8_t>(code_of(kLengths, length));
    }
    std::vector<std::uint32_t> literals(kLiterals, 0), distances(kDistances, 0);
    literals[0] = 1;  // a code has at least two words
    distances[0] = distances[1] = 1;
    literals[kEndOfBlock] = 1;
    for (const Token& token : tokens) {
        ++literals[token.length == 0 ? token.byte : kFirstLength + length_code[token.length]];
        if (token.length > 0) ++distances[distance_code[token.is_row]];
    }
    const Code literal_code(literals, 15), distance_words(distances, 15);
    std::vector<std::uint8_t> lengths;
    for (int i = 0; i < kLiterals; ++i) lengths.push_back(static_cast<std::uint8_t>(literal_code.length(i)));
    for (int i = 0; i < kDistances; ++i) lengths.push_back(static_cast<std::uint8_t>(distance_words.length(i)));
    std::vector<std::uint32_t> counts(kLengthCodes, 0);
    for (const auto length : lengths) ++counts[length];
    const Code code_of_lengths(counts, 7);

    bits.put(is_last, 1);
    bits.put(2, 2);  // codes of its own
    bits.put(kLiterals - 257, 5);
    bits.put(kDistances - 1, 5);
    bits.put(kLengthCodes - 4, 4);
    for (const int i : {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}) {
        bits.put(code_of_lengths.length(i), 3);
    }
    for (const auto length : lengths) code_of_lengths.put(bits, length);
    for (const Token& token : tokens) {
        if (token.length == 0) {
            literal_code.put(bits, token.byte);
            continue;
        }
        const Range& length = kLengths[length_code[token.length]];
        literal_code.put(bits, kFirstLength + length_code[token.length]);
        bits.put(token.length - length.first, length.bits);
        const int code = distance_code[token.is_row];
        distance_words.put(bits, code);
        bits.put((token.is_row ? row_bytes : voxel_bytes) - kDistanceRanges[code].first, kDistanceRanges[code].bits);
    }
    literal_code.put(bits, kEndOfBlock);
}

class Deflater {
public:
    Deflater(std::size_t voxel_bytes, std::size_t row_bytes, Bits& bits)
        : voxel_bytes_(voxel_bytes), row_bytes_(row_bytes > kFarthest ? voxel_bytes : row_bytes), bits_(bits) {
        tokens_.reserve(kTokens);
    }

    void bytes(const std::vector<std::uint8_t>& some) {
        for (const auto byte : some) put({0, byte, false});
    }

    void voxels(const std::uint8_t* data, std::size_t size) {
        for (std::size_t at = 0; at < size;) {
            const std::size_t most = std::min(kLongest, size - at);
            const std::size_t run = at >= voxel_bytes_ ? common(data + at, data + at - voxel_bytes_, most) : 0;
            const bool may_be_row = run < most && at >= row_bytes_;
            const std::size_t row = may_be_row ? common(data + at, data + at - row_bytes_, most) : 0;
            const std::size_t length = std::max(run, row);
            if (length < kShortest) {
                put({0, data[at], false});
                ++at;
            } else {
                put({static_cast<std::uint16_t>(length), 0, row > run});
                at += length;
            }
        }
    }

    void finish() {
        put_block(tokens_, true, voxel_bytes_, row_bytes_, bits_);
        bits_.finish();
    }

private:
    void put(Token token) {
        if (tokens_.size() == kTokens) {
            put_block(tokens_, false, voxel_bytes_, row_bytes_, bits_);
            tokens_.clear();
        }
        tokens_.push_back(token);
    }

    std::size_t voxel_bytes_, row_bytes_;
    Bits& bits_;
    std::vector<Token> tokens_;
};

}  // namespace

std::vector<std::uint8_t> deflated(const std::vector<std::uint8_t>& header, const std::uint8_t* voxels,
                                   std::size_t size, Packing packing, std::size_t voxel_bytes, std::size_t row_bytes) {
    const bool is_gzip = packing == Packing::gzip;
    std::vector<std::uint8_t> out{0x78, 0x01};
    if (is_gzip) out = {0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff};  // neither name nor time nor system
    Bits bits(out);
    Deflater deflater(voxel_bytes, row_bytes, bits);
    deflater.bytes(header);
    deflater.voxels(voxels, size);
    deflater.finish();
    if (is_gzip) {
        const std::uint32_t sum = libdeflate_crc32(libdeflate_crc32(0, header.data(), header.size()), voxels, size);
        bits.put(sum, 32);
        bits.put((header.size() + size) & 0xffffffffu, 32);
    } else {
        const std::uint32_t sum = libdeflate_adler32(libdeflate_adler32(1, header.data(), header.size()), voxels, size);
        for (int shift = 24; shift >= 0; shift -= 8) bits.put((sum >> shift) & 0xff, 8);
    }
    return out;
}

}  // namespace fastnnunet::images
