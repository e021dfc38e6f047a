/* What runs networks: the interface of the engine's plugins, which are opened at run time.
 *
 * A plugin is a shared library named libfastnnunet_NAME.so that exports `fastnnunet_backend_entry_1`. It holds no model
 * of its own: it opens the library of its maker (OpenVINO, ONNX Runtime, TensorRT) when it is asked to, and says what to
 * install where there is none. Plain C, so that a plugin may be built by another compiler; no exception leaves it.
 */
#ifndef FASTNNUNET_BACKEND_H
#define FASTNNUNET_BACKEND_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FASTNNUNET_PLUGIN __declspec(dllexport)
#else
#define FASTNNUNET_PLUGIN __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FASTNNUNET_BACKEND_INTERFACE 3

typedef struct fastnnunet_network fastnnunet_network; /* of a plugin */

/* A network to load. Axes as in the bundle's patch size: zyx, or yx for 2d. */
typedef struct fastnnunet_network_spec {
    size_t struct_size;
    const char* model_file; /* ONNX, or OpenVINO's .xml */
    const char* bundle;     /* the folder it is in */
    const char* precision;  /* "fp32", "bf16", "fp16", "int8" */
    const char* device;     /* "cpu", "cuda" or "cuda:N" */
    int32_t threads;        /* 1 or more */
    int64_t batch_size;     /* the model takes exactly so many patches at once; 0: any number */
    int64_t channels, heads;
    int32_t dims; /* 2 or 3 */
    int64_t patch_size[3];
    int32_t shapes_vary;     /* tiles are of any size (one pass), else of the patch size */
    const char* file_digest; /* SHA-256 of the model file in hex, of .xml that of the .bin behind it */
    const char* cache_folder; /* for compiled models; NULL: none is kept */
} fastnnunet_network_spec;

/* Where a function says why it failed. */
typedef struct fastnnunet_failure {
    char message[2048];
} fastnnunet_failure;

typedef struct fastnnunet_backend {
    int32_t interface_version;
    const char* name;
    const char* precisions; /* with spaces between */
    const char* devices;    /* "cpu", "cuda", "cpu cuda" */

    /* 0 where the maker's library is there, else 1 and the reason with what to install. */
    int32_t (*find)(fastnnunet_failure* failure);
    /* 0 and a network, or 1 and the reason. */
    int32_t (*load)(const fastnnunet_network_spec* spec, fastnnunet_network** network, fastnnunet_failure* failure);
    /* Logits (count, heads, tile) float32 of a contiguous batch (count, channels, tile). From any number of threads.
     * 0, or 1 and the reason in the maker's words: those of too little memory (core/no_memory.hpp) make tiles smaller.
     */
    int32_t (*run)(fastnnunet_network* network, const float* batch, int64_t count, const int64_t* tile, float* logits,
                   fastnnunet_failure* failure);
    void (*unload)(fastnnunet_network* network);

    /* Memory that a tile takes, measured, as a multiple of the float32 numbers that the network holds at once. */
    double (*overhead)(const fastnnunet_network* network);
    /* 1 and the longest axes it was made for, or 0 where it takes any. */
    int32_t (*largest_tile)(const fastnnunet_network* network, int64_t* tile);
    /* What the network computes in, and the maker's version. Valid as long as the network. */
    const char* (*precision)(const fastnnunet_network* network);
    const char* (*library)(const fastnnunet_network* network);

    /* The rest is for callers whose batches lie on the GPU that the network computes on: all NULL where there is none.
     *
     * Which GPU, as CUDA counts them, or -1: it computes on the CPU. */
    int32_t (*gpu)(const fastnnunet_network* network);
    /* The most patches in a batch. */
    int64_t (*most_on_gpu)(const fastnnunet_network* network);
    /* 1 where `run_on_gpu` may be captured as a CUDA graph from the second run of a shape on. What graphs of 16 shapes
     * need is kept. */
    int32_t (*can_capture)(const fastnnunet_network* network);
    /* As `run`, of addresses in the primary context of that GPU: puts the network on `stream`, a CUstream, or waits for
     * what is on it and computes. One caller at a time; not beside `run`. */
    int32_t (*run_on_gpu)(fastnnunet_network* network, const float* batch, int64_t count, const int64_t* tile,
                          float* logits, void* stream, fastnnunet_failure* failure);

    /* As `run`, for callers without a place for the logits: they stay where the maker's library has put them, until
     * `let_go` of `*held`. `*logits` is NULL where this network has them in no place of its own. Both functions NULL:
     * none has. */
    int32_t (*run_in_place)(fastnnunet_network* network, const float* batch, int64_t count, const int64_t* tile,
                            const float** logits, void** held, fastnnunet_failure* failure);
    void (*let_go)(fastnnunet_network* network, void* held);
} fastnnunet_backend;

typedef const fastnnunet_backend* (*fastnnunet_backend_entry)(void);
#define FASTNNUNET_BACKEND_ENTRY "fastnnunet_backend_entry_1"

#ifdef __cplusplus
}
#endif

#endif
