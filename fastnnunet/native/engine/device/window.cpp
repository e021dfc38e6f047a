#include "device/window.hpp"

#include <cmath>
#include <limits>

namespace fastnnunet::engine {
namespace {

constexpr std::int64_t kMostVoxels = std::int64_t{1} << 31;  // of a volume: kernels count rows and lines in 32 bits
constexpr std::size_t kAhead = 2;    // batches that are put on the stream before the first of them is waited for
constexpr std::size_t kMostShapes = 16;  // of batches whose graphs are kept

static_assert(kMaxBatch <= cuda::kMostTiles, "a batch of the window is gathered at once");

const cuda::Half* halves(const Half* of) { return reinterpret_cast<const cuda::Half*>(of); }
cuda::Half* halves(Half* of) { return reinterpret_cast<cuda::Half*>(of); }

template <class T>
cuda::Strides strides(const Volumes<T>& of) {
    return {of.count_stride, of.stride[0], of.stride[1]};
}

Grid grid_over(const Volumes<Half>& of, bool reduces = false) {
    return grid_of(of.shape[2], of.count * of.shape[0] * of.shape[1], 1, reduces);
}

template <class T>
void assign(T (&to)[3], const Index& from) {
    std::copy(from.begin(), from.end(), to);
}

// Mirrored axes, counted from 0 among `dims` spatial ones, as bits: 1 z, 2 y, 4 x
std::int64_t flip_bits(const std::vector<int>& axes, std::size_t dims) {
    std::int64_t bits = 0;
    for (const int axis : axes) bits |= std::int64_t{1} << (static_cast<std::size_t>(axis) + 3 - dims);
    return bits;
}

std::pair<float, float> values_of(const cuda::Limits& limits) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (limits.has_nan) return {nan, nan};
    return {cuda::value_of_key(limits.low), cuda::value_of_key(limits.high)};
}

}  // namespace

void check_size(std::int64_t count, const Index& shape) {
    if (static_cast<double>(count) * static_cast<double>(voxels_of(shape)) < static_cast<double>(kMostVoxels)) return;
    throw BackendError("an array of " + std::to_string(count) + " x " + std::to_string(shape[0]) + " x " +
                       std::to_string(shape[1]) + " x " + std::to_string(shape[2]) +
                       " is beyond what is computed on a GPU, " + std::to_string(kMostVoxels) +
                       " values\npredict with -device cpu");
}

void DeviceArithmetic::check() const {
    cuda::Limits limits[2];
    stream_.download(limits, limits_.get(), sizeof limits);
    const auto [sum_low, sum_high] = values_of(limits[0]);
    if (sum_low > sum_high) return;  // nothing was divided
    check_half(sum_low, sum_high, "the weighted logits");
    const auto [low, high] = values_of(limits[1]);
    check_half(low, high, "the logits");
}

Array4<Half> DeviceArithmetic::zeros(std::int64_t heads, const Index& shape) {
    Array4<Half> made = empty(heads, shape);
    stream_.clear(made.values.get(), sizeof(Half) * static_cast<std::size_t>(made.size()));
    return made;
}

Array4<Half> DeviceArithmetic::filled(const std::vector<Half>& values, const Index& shape) {
    Array4<Half> made = empty(static_cast<std::int64_t>(values.size()), shape);
    std::vector<Half> rows;  // one for each head, which all rows of it copy
    for (const Half value : values) rows.insert(rows.end(), static_cast<std::size_t>(shape[2]), value);
    const DeviceMemory<Half> there = stream_.upload(rows.data(), static_cast<std::int64_t>(rows.size()));
    copy({there.get(), made.count, shape[2], shape, {0, 0}}, made.view());
    return made;
}

WindowWeights DeviceArithmetic::weights(const TileWeights& of_tile, const ChunkedWindow& window) {
    WindowWeights made{stream_.upload(of_tile.tile().read()), zeros(1, padded_shape(window))};
    const Array4<Half> weights = stream_.upload(of_tile.halves().read());
    for (std::int64_t tile = 0; tile < window.tiles(); ++tile) {
        add_halves(weights.read(), part(made.total.view(), in_padded(window, tile)));
    }
    return made;
}

void DeviceArithmetic::add_weighted(const Volumes<const float>& logits, const Volume<const float>* weights,
                                    const Volumes<Half>& sums, bool is_first) {
    cuda::AddParams params{};
    params.logits = logits.data;
    params.logits_stride = strides(logits);
    if (weights != nullptr) {
        params.weights = weights->data;
        params.weights_stride = {0, weights->stride[0], weights->stride[1]};
    }
    params.sums = halves(sums.data);
    params.sums_stride = strides(sums);
    params.heads = sums.count;
    assign(params.shape, sums.shape);
    params.is_first = is_first;
    stream_.start_add_weighted(grid_over(sums), params);
}

void DeviceArithmetic::add_halves(const Volumes<const Half>& values, const Volumes<Half>& sums) {
    cuda::AddHalvesParams params{};
    params.values = halves(values.data);
    params.values_stride = strides(values);
    params.sums = halves(sums.data);
    params.sums_stride = strides(sums);
    params.heads = sums.count;
    assign(params.shape, sums.shape);
    stream_.start_add_halves(grid_over(sums), params);
}

void DeviceArithmetic::divide(const Volumes<Half>& sums, const Volume<const Half>& total, const std::string&) {
    divide(sums, halves(total.data), {0, total.stride[0], total.stride[1]}, 0);
}

void DeviceArithmetic::divide(const Volumes<Half>& sums, std::int64_t count, const std::string&) {
    divide(sums, nullptr, {}, static_cast<float>(count));
}

void DeviceArithmetic::divide(const Volumes<Half>& sums, const cuda::Half* total, cuda::Strides total_stride,
                              float count) {
    cuda::DivideParams params{};
    params.sums = halves(sums.data);
    params.sums_stride = strides(sums);
    params.total = total;
    params.total_stride = total_stride;
    params.limits = limits_.get();
    params.heads = sums.count;
    assign(params.shape, sums.shape);
    params.count = count;
    stream_.start_divide(grid_over(sums, true), params);
}

void DeviceArithmetic::copy(const Volumes<const Half>& from, const Volumes<Half>& to) {
    cuda::CopyParams params{};
    params.in = halves(from.data);
    params.in_stride = strides(from);
    params.out = halves(to.data);
    params.out_stride = strides(to);
    params.heads = to.count;
    assign(params.shape, to.shape);
    stream_.start_copy_halves(grid_over(to), params);
}

void DeviceNetwork::make_room(std::int64_t count, const Index& tile) {
    const std::int64_t voxels = count * voxels_of(tile);
    const auto at_least = [&](DeviceMemory<float>& memory, std::int64_t& size, std::int64_t wanted) {
        if (size >= wanted) return;
        forget();  // graphs hold the addresses
        memory.reset();
        size = 0;
        memory = stream.memory<float>(wanted);
        size = wanted;
    };
    at_least(batch_, batch_size_, voxels * model_.channels);
    at_least(logits_, logits_size_, voxels * model_.heads);
}

void DeviceNetwork::run(std::int64_t count, const Index& tile) {
    const std::pair key{count, tile};
    if (shapes_.size() == kMostShapes && shapes_.count(key) == 0) forget();
    Shape& shape = shapes_[key];
    if (!shape.has_run || !network_.can_capture()) {  // the first run compiles and loads, which cannot be captured
        put(count, tile);
        shape.has_run = true;
        return;
    }
    if (shape.graph == nullptr) shape.graph = capture(count, tile);
    const Gpu& gpu = stream.gpu();
    gpu.use();
    gpu.check(gpu.driver().cuGraphLaunch(shape.graph, stream.number()), "cuGraphLaunch");
}

void DeviceNetwork::put(std::int64_t count, const Index& tile) const {
    const Sizes of_network(tile.end() - static_cast<long>(model_.patch_size.size()), tile.end());
    stream.gpu().use();
    network_.run_on_gpu(batch(), count, of_network, logits(), stream.number());
}

void* DeviceNetwork::capture(std::int64_t count, const Index& tile) const {
    const Gpu& gpu = stream.gpu();
    const CudaDriver& driver = gpu.driver();
    void *graph = nullptr, *made = nullptr;
    gpu.use();
    gpu.check(driver.cuStreamBeginCapture(stream.number(), CudaDriver::kCaptureInThread), "cuStreamBeginCapture");
    try {
        put(count, tile);
    } catch (const Error&) {
        driver.cuStreamEndCapture(stream.number(), &graph);  // fails as well, but makes the stream usable again
        throw;
    }
    gpu.check(driver.cuStreamEndCapture(stream.number(), &graph), "cuStreamEndCapture");
    const int status = driver.cuGraphInstantiate(&made, graph, 0);
    driver.cuGraphDestroy(graph);
    gpu.check(status, "cuGraphInstantiate");
    return made;
}

void DeviceNetwork::forget() {
    const CudaDriver& driver = stream.gpu().driver();
    if (!shapes_.empty()) driver.cuStreamSynchronize(stream.number());  // a graph may be at work
    for (const auto& [key, shape] : shapes_) {
        if (shape.graph != nullptr) driver.cuGraphExecDestroy(shape.graph);
    }
    shapes_.clear();
}

DeviceTiles::DeviceTiles(DeviceNetwork& network, const Tiles& model, const Stream& of_case,
                         const Volumes<const float>& image)
    : network_(network), model_(model), of_case_(of_case), image_(image), turn_(network.turn) {
    stream().follow(of_case_);  // the image, and limits that are begun
}

DeviceTiles::DeviceTiles(const DeviceTiles& whole, Array4<float> part)
    : network_(whole.network_), model_(whole.model_), of_case_(whole.of_case_), image_(part.read()),
      own_(std::move(part)) {}

DeviceTiles::~DeviceTiles() {
    const CudaDriver& driver = stream().gpu().driver();
    for (void* event : ahead_) driver.cuEventDestroy(event);
    if (turn_.owns_lock()) driver.cuStreamSynchronize(stream().number());
}

void DeviceTiles::close() {
    of_case_.follow(stream());
    stream().synchronize();
}

std::unique_ptr<TileLogits> DeviceTiles::within(const ImagePart& part) const {
    Array4<float> cut = stream().array<float>(image_.count, part.size);
    gather(&part.origin, 1, part.size, 0, cut.values.get());
    return std::unique_ptr<TileLogits>(new DeviceTiles(*this, std::move(cut)));
}

void DeviceTiles::gather(const Index* origins, std::int64_t count, const Index& tile, std::int64_t flips,
                         float* out) const {
    cuda::GatherParams params{};
    params.image = image_.data;
    params.out = out;
    params.channels = image_.count;
    assign(params.shape, image_.shape);
    assign(params.tile, tile);
    params.count = count;
    params.copies = 1;
    for (std::int64_t i = 0; i < count; ++i) assign(params.origin[i], origins[i]);
    params.flips[0] = flips;
    stream().start_gather(grid_of(tile[2], count * image_.count * tile[0] * tile[1]), params);
}

Volumes<const float> DeviceTiles::of(const std::vector<Index>& origins, const Index& tile) {
    const auto count = static_cast<std::int64_t>(origins.size());
    const std::int64_t voxels = voxels_of(tile), most = std::min(count, network_.most);
    const std::vector<std::vector<int>> mirrors = subsets(model_.mirror_axes);
    const bool is_apart = mirrors.size() > 1 || most < count;  // the network's memory is written to again
    network_.make_room(most, tile);
    if (is_apart && total_.size() < count * model_.heads * voxels) {
        total_ = {};
        total_ = stream().array<float>(count * model_.heads, tile);
    }
    for (std::int64_t first = 0; first < count; first += most) {
        const std::int64_t now = std::min(most, count - first);
        float* to = is_apart ? total_.values.get() + first * model_.heads * voxels : nullptr;
        for (std::size_t i = 0; i < mirrors.size(); ++i) {
            const std::int64_t flips = flip_bits(mirrors[i], model_.patch_size.size());
            run(&origins[static_cast<std::size_t>(first)], now, tile, flips);
            if (!is_apart) continue;
            cuda::MirrorParams params{};
            params.parts = network_.logits();
            params.total = to;
            params.heads = now * model_.heads;
            assign(params.tile, tile);
            params.copies = 1;
            params.flips[0] = flips;
            params.is_first = i == 0;
            if (i > 0 && i + 1 == mirrors.size()) params.divisor = static_cast<float>(mirrors.size());
            stream().start_add_mirrored(grid_of(tile[2], params.heads * tile[0] * tile[1]), params);
        }
    }
    return {is_apart ? total_.values.get() : network_.logits(), count * model_.heads, voxels, tile,
            {tile[1] * tile[2], tile[2]}};
}

void DeviceTiles::run(const Index* origins, std::int64_t count, const Index& tile, std::int64_t flips) {
    gather(origins, count, tile, flips, network_.batch());
    network_.run(count, tile);
    // the stream runs a little ahead of what is reported, and errors come to light where they belong
    const Gpu& gpu = stream().gpu();
    void* event = nullptr;
    gpu.check(gpu.driver().cuEventCreate(&event, CudaDriver::kNoTiming), "cuEventCreate");
    ahead_.push_back(event);
    gpu.check(gpu.driver().cuEventRecord(event, stream().number()), "cuEventRecord");
    if (ahead_.size() <= kAhead) return;
    const int status = gpu.driver().cuEventSynchronize(ahead_.front());
    gpu.driver().cuEventDestroy(ahead_.front());
    ahead_.pop_front();
    gpu.check(status, "cuEventSynchronize");
}

}  // namespace fastnnunet::engine
