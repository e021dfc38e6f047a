/* A backend for tests that finds memory for tiles of FASTNNUNET_TEST_MOST voxels and no more.
 * Logits of head h are h * x - h * h / 2: label 0 below 0.5, 1 from there on, 2 from 1.5 on. */
#include <stdlib.h>
#include <string.h>

#include "backends/backend.h"

struct fastnnunet_network {
    int64_t channels, heads;
    int32_t dims;
};

static int32_t find(fastnnunet_failure* failure) {
    (void)failure;
    return 0;
}

static int32_t load(const fastnnunet_network_spec* spec, fastnnunet_network** network, fastnnunet_failure* failure) {
    (void)failure;
    *network = malloc(sizeof **network);
    (*network)->channels = spec->channels;
    (*network)->heads = spec->heads;
    (*network)->dims = spec->dims;
    return 0;
}

static int32_t run(fastnnunet_network* network, const float* batch, int64_t count, const int64_t* tile, float* logits,
                   fastnnunet_failure* failure) {
    int64_t voxels = 1;
    for (int32_t axis = 0; axis < network->dims; ++axis) voxels *= tile[axis];
    if (voxels > atoll(getenv("FASTNNUNET_TEST_MOST"))) {
        strcpy(failure->message, "std::bad_alloc");
        return 1;
    }
    for (int64_t n = 0; n < count; ++n) {
        const float* from = batch + n * network->channels * voxels;
        for (int64_t head = 0; head < network->heads; ++head) {
            float* to = logits + (n * network->heads + head) * voxels;
            for (int64_t i = 0; i < voxels; ++i) to[i] = (float)head * from[i] - (float)(head * head) / 2;
        }
    }
    return 0;
}

static void unload(fastnnunet_network* network) { free(network); }
static double overhead(const fastnnunet_network* network) {
    (void)network;
    return 1;
}
static int32_t largest_tile(const fastnnunet_network* network, int64_t* tile) {
    (void)network;
    (void)tile;
    return 0;
}
static const char* text(const fastnnunet_network* network) {
    (void)network;
    return "fp32";
}

static const fastnnunet_backend backend = {FASTNNUNET_BACKEND_INTERFACE, "onnxruntime", "fp32", "cpu", find, load, run,
                                           unload, overhead, largest_tile, text, text};

FASTNNUNET_PLUGIN const fastnnunet_backend* fastnnunet_backend_entry_1(void) { return &backend; }
