// What the window, one pass and the labelling of chunks do to arrays, so that they are one code for the CPU and for
// GPUs. As fastnnunet/runtime/arithmetic.py.
//
// Arrays and views are as everywhere, but their addresses may be those of a GPU's memory: nothing but the arithmetic
// that made them looks at what is in them. Axes: H head, Z Y X space.
#pragma once

#include <list>
#include <mutex>
#include <string>
#include <vector>

#include "core/window.hpp"
#include "predict/arrays.hpp"

namespace fastnnunet::engine {

// What a tile weighs at each voxel, and the sums of that over all tiles of an image.
struct WindowWeights {
    Array4<float> tile;  // one volume
    Array4<Half> total;  // of the padded image, which begins at the window's first tile
};

// The weights of a window's tiles, on the CPU.
class TileWeights {
public:
    TileWeights(const Sizes& patch, bool use_gaussian);

    const Array4<float>& tile() const { return values_; }
    const Array4<Half>& halves() const { return halves_; }  // the same numbers

    // The sum of the weights of all tiles at every voxel of a window, rounded after each one. It is kept for the next
    // image of its shape.
    Array4<Half> total(const ChunkedWindow& window, int threads) const;

private:
    Array4<float> values_;
    Array4<Half> halves_;
    mutable std::mutex turn_;
    mutable std::list<Array4<Half>> kept_;
};

// The shape of a window's image with its padding, and where its tiles lie in it
Index padded_shape(const ChunkedWindow& window);
Box in_padded(const ChunkedWindow& window, std::int64_t tile);

class Arithmetic {
public:
    virtual ~Arithmetic() = default;

    virtual Array4<Half> empty(std::int64_t heads, const Index& shape) = 0;  // of whatever values
    virtual Array4<Half> zeros(std::int64_t heads, const Index& shape) = 0;
    virtual Array4<Half> filled(const std::vector<Half>& values, const Index& shape) = 0;  // with one for each head
    virtual WindowWeights weights(const TileWeights& of_tile, const ChunkedWindow& window) = 0;

    // sums = half(sums + logits * weights); is_first: half(logits * weights), whatever sums held. Null: all weigh one.
    virtual void add_weighted(const Volumes<const float>& logits, const Volume<const float>* weights,
                              const Volumes<Half>& sums, bool is_first) = 0;
    // sums = half(sums + values)
    virtual void add_halves(const Volumes<const Half>& values, const Volumes<Half>& sums) = 0;
    // sums = half(sums / total), or of a number. Throws BackendError, now or when the labels are fetched, where the
    // sums (`what`) or the quotients leave the range of float16.
    virtual void divide(const Volumes<Half>& sums, const Volume<const Half>& total, const std::string& what) = 0;
    virtual void divide(const Volumes<Half>& sums, std::int64_t count, const std::string& what) = 0;
    virtual void copy(const Volumes<const Half>& from, const Volumes<Half>& to) = 0;
};

// By the core, with so many threads; 0: all cores.
class HostArithmetic : public Arithmetic {
public:
    explicit HostArithmetic(int threads) : threads_(threads) {}

    Array4<Half> empty(std::int64_t heads, const Index& shape) override { return Array4<Half>(heads, shape); }
    Array4<Half> zeros(std::int64_t heads, const Index& shape) override;
    Array4<Half> filled(const std::vector<Half>& values, const Index& shape) override;
    WindowWeights weights(const TileWeights& of_tile, const ChunkedWindow& window) override;
    void add_weighted(const Volumes<const float>& logits, const Volume<const float>* weights,
                      const Volumes<Half>& sums, bool is_first) override;
    void add_halves(const Volumes<const Half>& values, const Volumes<Half>& sums) override;
    void divide(const Volumes<Half>& sums, const Volume<const Half>& total, const std::string& what) override;
    void divide(const Volumes<Half>& sums, std::int64_t count, const std::string& what) override;
    void copy(const Volumes<const Half>& from, const Volumes<Half>& to) override;

private:
    int threads_;
};

// Throws BackendError when float16 would hold an infinity or NaN.
void check_half(float low, float high, const std::string& what);

}  // namespace fastnnunet::engine
