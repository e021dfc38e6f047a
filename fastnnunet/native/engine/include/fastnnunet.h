/* FastnnUNet's engine in C: load a bundle, segment images, with the labels that `fastnnunet predict` gives.
 *
 * Handles are opaque. Every function that can fail returns a status; what went wrong, what was got, what was expected
 * and how to mend it is then `fastnnunet_last_error()` of the same thread. Structs begin with their size, so that
 * programs built against an older header go on working: fill them with their `_init` function first.
 *
 * A loaded model may be used by any number of threads at once; each gets what it would get alone.
 */
#ifndef FASTNNUNET_H
#define FASTNNUNET_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FASTNNUNET_API __declspec(dllexport)
#else
#define FASTNNUNET_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FASTNNUNET_API_VERSION 1 /* raised by changes that programs have to know of */

typedef enum fastnnunet_status {
    FASTNNUNET_OK = 0,
    FASTNNUNET_BAD_ARGUMENT = 1, /* a mistake of the program: a null pointer, a shape below 1 */
    FASTNNUNET_BAD_OPTION = 2,   /* an option, or a bundle that this engine cannot reproduce */
    FASTNNUNET_NOT_FOUND = 3,    /* a bundle or a file is missing */
    FASTNNUNET_CORRUPT = 4,      /* a bundle was changed, truncated or damaged */
    FASTNNUNET_NEWER_FORMAT = 5, /* a bundle of a later version */
    FASTNNUNET_BAD_IMAGE = 6,    /* an image that cannot be used */
    FASTNNUNET_BACKEND = 7,      /* a backend is not installed or cannot run here */
    FASTNNUNET_NO_MEMORY = 8,
    FASTNNUNET_NO_ROOM = 9,    /* an output cannot be written */
    FASTNNUNET_CANCELLED = 10, /* by the program's `progress` */
    FASTNNUNET_INTERNAL = 99   /* a mistake of this library */
} fastnnunet_status;

typedef struct fastnnunet_model fastnnunet_model;
typedef struct fastnnunet_result fastnnunet_result;

/* How a bundle is to be predicted. NULL, 0 and negative numbers mean the default. */
typedef struct fastnnunet_options {
    size_t struct_size;
    const char* backend;      /* "openvino", "onnxruntime", "tensorrt"; NULL or "auto": the fastest there is */
    const char* precision;    /* "fp32" (as nnU-Net), "bf16", "fp16", "int8" */
    const char* device;       /* "cpu", "cuda", "cuda:1" */
    const char* folds;        /* of an ensemble, such as "0 2"; NULL: all */
    int32_t threads;          /* 0: all cores */
    double step_size;         /* of nnU-Net's window; 0: the bundle's, or one pass where the bundle says how */
    int32_t no_mirroring;     /* 1: not along the axes that the model was trained with */
    int32_t no_gaussian;      /* 1: tiles of the window weigh the same everywhere */
    int32_t passes;           /* of one pass: the mean of so many; 0: 1 */
    const char* memory_limit; /* of one pass, such as "4G" */
    const char* plugins;      /* the folder of the backends; NULL: beside this library */
    int32_t no_locate;        /* 1: everywhere, though the bundle has a locator */
} fastnnunet_options;

/* Called after every tile; another value than 0 ends the prediction. Not called for a caller who gave none. */
typedef int (*fastnnunet_progress)(void* user, int64_t tiles_done, int64_t tiles);

/* An image as nnU-Net's reader returns it: float32, contiguous, channels then z, y, x; 2d images have z = 1. */
typedef struct fastnnunet_image {
    size_t struct_size;
    const float* voxels;
    int64_t shape[4];      /* channels, z, y, x */
    double spacing_mm[3];  /* z, y, x */
    const int32_t* previous; /* of a cascade stage: the previous stage's labels (z, y, x); else NULL */
    fastnnunet_progress progress;
    void* user;
    int32_t probabilities; /* 1: those of the heads too, from which the labels then come, as in nnU-Net */
} fastnnunet_image;

/* Labels in the axes of the image, contiguous; valid until the result is freed. */
typedef struct fastnnunet_labels {
    size_t struct_size;
    const void* voxels;
    int32_t bytes_per_voxel; /* 1 (uint8) or 2 (uint16) */
    int64_t shape[3];        /* z, y, x */
    int64_t network_shape[4]; /* channels, z, y, x of what the network saw */
    double preprocess_s, infer_s, postprocess_s;
    const float* probabilities; /* heads, z, y, x, where the image asked for them; else NULL */
    int64_t heads;
} fastnnunet_labels;

/* The files of one image, and what to do with them. NULL means nothing, or the default. */
typedef struct fastnnunet_files {
    size_t struct_size;
    const char* const* channels; /* a file each (or, in builds with DICOM, a folder of slices) */
    int32_t channel_count;
    const char* output;       /* the label map, in the format of its ending: whole, or as it was; .dcm: a DICOM SEG */
    const char* previous;     /* of a cascade stage: the previous stage's label map */
    const char* series_uid;   /* which series of a DICOM folder that holds several */
    const char* keep_largest; /* only the largest component of: "all", "each", labels; words with spaces between */
    const char* min_size;     /* no smaller components: "20" (voxels), "50mm3" */
    const char* fill_holes;   /* of these labels, as for keep_largest */
    fastnnunet_progress progress;
    void* user;
    int32_t save_probabilities;  /* 1: into a .npz beside the output */
    const char* postprocessing;  /* nnU-Net's postprocessing.json; its steps come before the others */
} fastnnunet_files;

/* The version of this library's interface and of its files. */
FASTNNUNET_API int fastnnunet_api_version(void);
FASTNNUNET_API const char* fastnnunet_version(void);

/* What the last call of this thread that failed had to say; "" before any has. Valid until the next one fails. */
FASTNNUNET_API const char* fastnnunet_last_error(void);

FASTNNUNET_API void fastnnunet_options_init(fastnnunet_options* options, size_t struct_size);
FASTNNUNET_API void fastnnunet_image_init(fastnnunet_image* image, size_t struct_size);
FASTNNUNET_API void fastnnunet_files_init(fastnnunet_files* files, size_t struct_size);
FASTNNUNET_API void fastnnunet_labels_init(fastnnunet_labels* labels, size_t struct_size);

/* Check a bundle folder and load its model. `options` may be NULL. */
FASTNNUNET_API fastnnunet_status fastnnunet_load(const char* bundle, const fastnnunet_options* options,
                                                 fastnnunet_model** model);
FASTNNUNET_API void fastnnunet_free(fastnnunet_model* model);

/* What is loaded, as a JSON object; valid as long as the model. */
FASTNNUNET_API const char* fastnnunet_describe(const fastnnunet_model* model);

/* Segment an image in memory. */
FASTNNUNET_API fastnnunet_status fastnnunet_predict(const fastnnunet_model* model, const fastnnunet_image* image,
                                                    fastnnunet_result** result);
FASTNNUNET_API fastnnunet_status fastnnunet_result_labels(const fastnnunet_result* result, fastnnunet_labels* labels);
FASTNNUNET_API void fastnnunet_result_free(fastnnunet_result* result);

/* Read an image, segment it and write its labels. */
FASTNNUNET_API fastnnunet_status fastnnunet_predict_files(const fastnnunet_model* model, const fastnnunet_files* files);

#ifdef __cplusplus
}
#endif

#endif
