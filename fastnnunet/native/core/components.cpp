#include "core/components.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/threads.hpp"

namespace fastnnunet {
namespace {

struct Run {
    std::int32_t start, stop;  // along x, half open
};

// The first index from x on whose value is (not) zero, or width
template <bool Zero>
std::int64_t find(const std::uint8_t* row, std::int64_t x, std::int64_t width) {
    constexpr std::uint64_t kOnes = 0x0101010101010101u, kHighs = 0x8080808080808080u;
    for (; x + 8 <= width; x += 8) {
        std::uint64_t eight;
        std::memcpy(&eight, row + x, sizeof eight);
        const bool found = Zero ? ((eight - kOnes) & ~eight & kHighs) != 0 : eight != 0;
        if (found) break;
    }
    while (x < width && (row[x] == 0) != Zero) ++x;
    return x;
}

// All runs of zeros, or of non-zeros, in the order of a scan
class Runs {
public:
    Runs(const Volume<const std::uint8_t>& mask, bool zeros, int threads)
        : depth_(mask.shape[0]), height_(mask.shape[1]), first_(depth_ * height_ + 1, 0) {
        std::vector<std::vector<Run>> planes(depth_);
        parallel_for(depth_, threads, [&](std::int64_t z) {
            for (std::int64_t y = 0; y < height_; ++y) {
                const std::size_t before = planes[z].size();
                zeros ? scan<true>(mask.row(z, y), mask.shape[2], planes[z])
                      : scan<false>(mask.row(z, y), mask.shape[2], planes[z]);
                first_[z * height_ + y + 1] = static_cast<std::int64_t>(planes[z].size() - before);
            }
        });
        for (std::size_t row = 1; row < first_.size(); ++row) first_[row] += first_[row - 1];
        if (first_.back() > std::numeric_limits<std::int32_t>::max()) {
            throw std::invalid_argument("connected components: too many runs of voxels");
        }
        runs_.resize(first_.back());
        parent_.resize(first_.back());
        parallel_for(depth_, threads, [&](std::int64_t z) {
            std::copy(planes[z].begin(), planes[z].end(), runs_.begin() + first_[z * height_]);
            for (std::int64_t i = first_[z * height_]; i < first_[(z + 1) * height_]; ++i) {
                parent_[i] = static_cast<std::int32_t>(i);
            }
        });
    }

    std::int64_t count() const { return static_cast<std::int64_t>(runs_.size()); }
    const Run& operator[](std::int64_t i) const { return runs_[i]; }
    std::int64_t first(std::int64_t z, std::int64_t y) const { return first_[z * height_ + y]; }
    std::int64_t stop(std::int64_t z, std::int64_t y) const { return first_[z * height_ + y + 1]; }

    // The first run of the component run `i` belongs to
    std::int32_t root(std::int32_t i) {
        while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
        return i;
    }

    void join(int connectivity, int threads) {
        // Slabs of planes share no runs; then the planes where slabs meet.
        const std::int64_t slabs = thread_count(threads, depth_);
        const auto start_of = [&](std::int64_t slab) { return slab * depth_ / slabs; };
        parallel_for(slabs, threads, [&](std::int64_t slab) {
            for (std::int64_t z = start_of(slab); z < start_of(slab + 1); ++z) {
                join_within(z, connectivity);
                if (z > start_of(slab)) join_below(z, connectivity);
            }
        });
        for (std::int64_t slab = 1; slab < slabs; ++slab) join_below(start_of(slab), connectivity);
    }

private:
    template <bool Zeros>
    static void scan(const std::uint8_t* row, std::int64_t width, std::vector<Run>& runs) {
        for (std::int64_t x = find<Zeros>(row, 0, width); x < width;) {
            const std::int64_t stop = find<!Zeros>(row, x, width);
            runs.push_back({static_cast<std::int32_t>(x), static_cast<std::int32_t>(stop)});
            x = find<Zeros>(row, stop, width);
        }
    }

    void unite(std::int64_t a, std::int64_t b) {
        const std::int32_t root_a = root(static_cast<std::int32_t>(a)), root_b = root(static_cast<std::int32_t>(b));
        if (root_a != root_b) parent_[std::max(root_a, root_b)] = std::min(root_a, root_b);
    }

    // Runs of two rows that overlap, or with reach 1 touch at a corner
    void join_rows(std::int64_t row, std::int64_t other, std::int32_t reach) {
        std::int64_t i = first_[row], j = first_[other];
        while (i < first_[row + 1] && j < first_[other + 1]) {
            if (runs_[i].start < runs_[j].stop + reach && runs_[j].start < runs_[i].stop + reach) unite(i, j);
            runs_[i].stop < runs_[j].stop ? ++i : ++j;
        }
    }

    void join_within(std::int64_t z, int connectivity) {
        for (std::int64_t y = 1; y < height_; ++y) {
            join_rows(z * height_ + y, z * height_ + y - 1, connectivity > 1 ? 1 : 0);
        }
    }

    void join_below(std::int64_t z, int connectivity) {
        for (std::int64_t y = 0; y < height_; ++y) {
            for (std::int64_t other = std::max<std::int64_t>(y - 1, 0); other <= std::min(y + 1, height_ - 1); ++other) {
                const int differing = other == y ? 1 : 2;
                if (differing > connectivity) continue;
                join_rows(z * height_ + y, (z - 1) * height_ + other, connectivity > differing ? 1 : 0);
            }
        }
    }

    std::int64_t depth_, height_;
    std::vector<std::int64_t> first_;  // per row: number of runs before it
    std::vector<Run> runs_;
    std::vector<std::int32_t> parent_;
};

}  // namespace

std::vector<std::int64_t> label_components(const Volume<const std::uint8_t>& mask, int connectivity,
                                           const Volume<std::int32_t>& labels, int threads) {
    if (connectivity < 1 || connectivity > 3) {
        throw std::invalid_argument("connected components: connectivity must be 1, 2 or 3");
    }
    if (mask.shape != labels.shape) throw std::invalid_argument("connected components: labels of another shape");
    Runs runs(mask, false, threads);
    runs.join(connectivity, threads);
    std::vector<std::int32_t> label_of(runs.count());
    std::vector<std::int64_t> sizes;
    for (std::int64_t i = 0; i < runs.count(); ++i) {
        const std::int32_t root = runs.root(static_cast<std::int32_t>(i));
        if (root == i) sizes.push_back(0);
        label_of[i] = root == i ? static_cast<std::int32_t>(sizes.size()) : label_of[root];
        sizes[label_of[i] - 1] += runs[i].stop - runs[i].start;
    }
    parallel_for(labels.shape[0], threads, [&](std::int64_t z) {
        for (std::int64_t y = 0; y < labels.shape[1]; ++y) {
            std::int32_t* row = labels.row(z, y);
            std::fill(row, row + labels.shape[2], 0);
            for (std::int64_t i = runs.first(z, y); i < runs.stop(z, y); ++i) {
                std::fill(row + runs[i].start, row + runs[i].stop, label_of[i]);
            }
        }
    });
    return sizes;
}

void fill_holes(const Volume<std::uint8_t>& mask, int threads) {
    const auto [depth, height, width] = mask.shape;
    Runs runs({mask.data, mask.shape, mask.stride}, true, threads);
    runs.join(1, threads);
    std::vector<std::uint8_t> is_outside(runs.count(), 0);  // by root
    for (std::int64_t z = 0; z < depth; ++z) {
        for (std::int64_t y = 0; y < height; ++y) {
            const bool border_row = z == 0 || z == depth - 1 || y == 0 || y == height - 1;
            for (std::int64_t i = runs.first(z, y); i < runs.stop(z, y); ++i) {
                if (border_row || runs[i].start == 0 || runs[i].stop == width) {
                    is_outside[runs.root(static_cast<std::int32_t>(i))] = 1;
                }
            }
        }
    }
    for (std::int64_t i = 0; i < runs.count(); ++i) {  // roots come first
        is_outside[i] = is_outside[runs.root(static_cast<std::int32_t>(i))];
    }
    parallel_for(depth, threads, [&, height = height](std::int64_t z) {
        for (std::int64_t y = 0; y < height; ++y) {
            std::uint8_t* row = mask.row(z, y);
            for (std::int64_t i = runs.first(z, y); i < runs.stop(z, y); ++i) {
                if (!is_outside[i]) std::fill(row + runs[i].start, row + runs[i].stop, std::uint8_t{1});
            }
        }
    });
}

}  // namespace fastnnunet
