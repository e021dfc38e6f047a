// The window's arithmetic on a stream, and the tiles of a case through a network on its GPU.
// As fastnnunet/runtime/device.
#pragma once

#include <deque>
#include <map>
#include <mutex>

#include "device/gpu.hpp"
#include "predict/ways.hpp"

namespace fastnnunet::engine {

// Throws BackendError for a volume that kernels cannot count.
void check_size(std::int64_t count, const Index& shape);

// On one stream. `limits` (2): of sums and of quotients, looked at when the labels are fetched.
class DeviceArithmetic : public Arithmetic {
public:
    DeviceArithmetic(const Stream& stream, DeviceMemory<cuda::Limits> limits)
        : stream_(stream), limits_(std::move(limits)) {}

    const DeviceMemory<cuda::Limits>& limits() const { return limits_; }
    // Waits for the stream. Throws BackendError where values left the range of float16.
    void check() const;

    Array4<Half> empty(std::int64_t heads, const Index& shape) override { return stream_.array<Half>(heads, shape); }
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
    void divide(const Volumes<Half>& sums, const cuda::Half* total, cuda::Strides total_stride, float count);

    const Stream& stream_;
    DeviceMemory<cuda::Limits> limits_;
};

// A network with its stream, and memory for a batch and its logits. It belongs to one caller at a time.
class DeviceNetwork {
public:
    DeviceNetwork(const Gpu& gpu, const Network& network, const Tiles& model)
        : stream(gpu), most(network.most_on_gpu()), network_(network), model_(model) {}
    ~DeviceNetwork() { forget(); }
    DeviceNetwork(const DeviceNetwork&) = delete;
    DeviceNetwork& operator=(const DeviceNetwork&) = delete;

    std::mutex turn;
    const Stream stream;
    const std::int64_t most;  // patches in a batch

    // Room for batches (count, channels, tile) and logits (count, heads, tile). Throws NoMemoryError.
    void make_room(std::int64_t count, const Index& tile);
    float* batch() const { return batch_.get(); }
    float* logits() const { return logits_.get(); }
    // Puts the network on the stream for the batch that lies there: as a CUDA graph from the second time of a shape on,
    // where its backend can.
    void run(std::int64_t count, const Index& tile);

private:
    struct Shape {
        bool has_run = false;
        void* graph = nullptr;  // CUgraphExec
    };

    void put(std::int64_t count, const Index& tile) const;
    void* capture(std::int64_t count, const Index& tile) const;
    void forget();

    const Network& network_;
    const Tiles& model_;
    DeviceMemory<float> batch_, logits_;
    std::int64_t batch_size_ = 0, logits_size_ = 0;
    std::map<std::pair<std::int64_t, Index>, Shape> shapes_;
};

// Tiles of a case that lies on the GPU; the network's turn is held as long as this lives.
class DeviceTiles : public TileLogits {
public:
    // `image`, contiguous, is what `of_case` made.
    DeviceTiles(DeviceNetwork& network, const Tiles& model, const Stream& of_case, const Volumes<const float>& image);
    // Waits for the network, whose memory is the next caller's. What failed is told by `close`.
    ~DeviceTiles();

    Volumes<const float> of(const std::vector<Index>& origins, const Index& tile) override;
    std::unique_ptr<TileLogits> within(const ImagePart& part) const override;
    const Stream& stream() const { return network_.stream; }
    // Waits for the network; what its stream made may be used by the case's from here on. Throws BackendError.
    void close();

private:
    DeviceTiles(const DeviceTiles& whole, Array4<float> part);

    void gather(const Index* origins, std::int64_t count, const Index& tile, std::int64_t flips, float* out) const;
    void run(const Index* origins, std::int64_t count, const Index& tile, std::int64_t flips);

    DeviceNetwork& network_;
    const Tiles& model_;
    const Stream& of_case_;
    Volumes<const float> image_;
    std::unique_lock<std::mutex> turn_;  // of a part: the whole has it
    Array4<float> own_, total_;
    std::deque<void*> ahead_;  // events after batches that were put on the stream
};

}  // namespace fastnnunet::engine
