#include "core/tiles.hpp"

#include <algorithm>
#include <utility>

namespace fastnnunet {
namespace {

std::int64_t up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }  // of values from 0 on

std::int64_t down(std::int64_t value, std::int64_t by) { return value / by - (value % by < 0); }

Cut cut_axis(const TileAxis& axis, std::int64_t tile, std::int64_t shared) {
    const std::int64_t frame = axis.frame();
    const std::int64_t units = (frame - tile) / axis.multiple;  // from the first tile to the last
    const std::int64_t step = std::max<std::int64_t>(1, down(tile - shared, axis.multiple));
    const std::int64_t gaps = up(units, step);  // 0: the tile is the frame
    Sizes starts;
    for (std::int64_t i = 0; i <= gaps; ++i) {
        starts.push_back(i * units / std::max<std::int64_t>(1, gaps) * axis.multiple);
    }
    Cut cut{frame, tile, {}, {}, axis.before()};
    // tile i reaches, in every shift, from starts[i] - before[0] to starts[i] + tile - before.back()
    Sizes kept{0};
    for (std::size_t i = 1; i < starts.size(); ++i) {
        const std::int64_t shared_twice = starts[i - 1] + tile + starts[i] - cut.before[0] - cut.before.back();
        kept.push_back(std::clamp<std::int64_t>(down(shared_twice, 2), 0, axis.size));
    }
    kept.push_back(axis.size);
    for (std::size_t i = 0; i < starts.size(); ++i) {
        if (kept[i] >= kept[i + 1]) continue;  // only zeros
        cut.starts.push_back(starts[i]);
        cut.kept.push_back(kept[i]);
    }
    cut.kept.push_back(axis.size);
    return cut;
}

}  // namespace

Sizes TileAxis::offsets() const {
    Sizes found;
    for (std::int64_t k = 0; k < shifts; ++k) found.push_back(k * multiple / shifts);
    return found;
}

std::int64_t TileAxis::frame() const { return up(std::max(least, size + offsets().back()), multiple) * multiple; }

Sizes TileAxis::before() const {
    Sizes found = offsets();
    const std::int64_t below = centre_padding(size + found.back(), frame()).below;
    for (std::int64_t& offset : found) offset += below;
    return found;
}

std::pair<std::int64_t, std::int64_t> TileAxis::crop(std::int64_t begin, std::int64_t end) const {
    const Sizes zeros = before();
    TileAxis part = *this;
    part.size = least;  // of every length that a part may have, the zeros before it are as many
    const std::int64_t phase = part.before()[0] - zeros[0];
    const std::int64_t latest = phase + down(begin - phase, multiple) * multiple;
    const std::int64_t needed = up(end - latest, multiple) * multiple, length = std::max(least, needed);
    std::int64_t earlier = (length - needed) / multiple / 2;  // the rest on both sides, as far as the frame goes
    const std::int64_t beyond = latest - earlier * multiple + length - (frame() - zeros.back());
    earlier += up(std::max<std::int64_t>(0, beyond), multiple);
    earlier = std::min({earlier, down(latest + zeros[0], multiple), down(latest + length - end, multiple)});
    return {latest - std::max<std::int64_t>(0, earlier) * multiple, length};
}

std::vector<Cut> TileAxis::cuts() const {
    const std::int64_t shared = 2 * halo + offsets().back(), longest = frame();
    const std::int64_t smallest = std::min(longest, (up(shared, multiple) + 1) * multiple);
    std::vector<Cut> found;
    for (std::int64_t tile = smallest; tile <= longest && !(most && tile > *most); tile += multiple) {
        Cut cut = cut_axis(*this, tile, shared);
        if (found.empty() || cut.computed() <= found.back().computed()) found.push_back(std::move(cut));
    }
    std::reverse(found.begin(), found.end());
    return found;
}

Index Tiling::tile() const { return {cuts[0].tile, cuts[1].tile, cuts[2].tile}; }

Index Tiling::grid() const {
    Index count{};
    for (int axis = 0; axis < 3; ++axis) count[axis] = static_cast<std::int64_t>(cuts[axis].starts.size());
    return count;
}

Box Tiling::kept(const Index& number) const {
    Box box{};
    for (int axis = 0; axis < 3; ++axis) {
        box.start[axis] = cuts[axis].kept.at(number[axis]);
        box.stop[axis] = cuts[axis].kept.at(number[axis] + 1);
    }
    return box;
}

Index Tiling::origin(const Index& number, std::int64_t shift) const {
    Index at{};
    for (int axis = 0; axis < 3; ++axis) at[axis] = cuts[axis].starts.at(number[axis]) - cuts[axis].before.at(shift);
    return at;
}

std::optional<Tiling> fewest_tiles(const TileAxes& axes, const TileCost& cost, std::int64_t limit) {
    const std::vector<Cut> along_z = axes[0].cuts(), along_y = axes[1].cuts(), along_x = axes[2].cuts();
    std::optional<std::pair<std::int64_t, std::int64_t>> best;
    std::array<const Cut*, 3> chosen{};
    for (const Cut& z : along_z) {
        for (const Cut& y : along_y) {
            const auto x = std::find_if(along_x.begin(), along_x.end(),
                                        [&](const Cut& one) { return cost({z.tile, y.tile, one.tile}) <= limit; });
            if (x == along_x.end()) continue;
            const auto count = [](const Cut& cut) { return static_cast<std::int64_t>(cut.starts.size()); };
            const std::pair merit(z.computed() * y.computed() * x->computed(), count(z) * count(y) * count(*x));
            if (!best || merit < *best) {
                best = merit;
                chosen = {&z, &y, &*x};
            }
        }
    }
    if (!best) return std::nullopt;
    return Tiling{{*chosen[0], *chosen[1], *chosen[2]}};
}

std::optional<std::int64_t> smaller_limit(const TileAxes& axes, const TileCost& cost, std::int64_t limit) {
    const std::optional<Tiling> tiling = fewest_tiles(axes, cost, limit);
    const std::optional<std::int64_t> least = least_cost(axes, cost);
    if (!tiling || !least) return std::nullopt;
    const std::int64_t now = cost(tiling->tile());
    if (now <= *least) return std::nullopt;
    return std::max(*least, now / 2);
}

std::optional<std::int64_t> least_cost(const TileAxes& axes, const TileCost& cost) {
    Index smallest{};
    for (int axis = 0; axis < 3; ++axis) {
        const std::vector<Cut> cuts = axes[axis].cuts();
        if (cuts.empty()) return std::nullopt;
        smallest[axis] = cuts.back().tile;
    }
    return cost(smallest);
}

}  // namespace fastnnunet
