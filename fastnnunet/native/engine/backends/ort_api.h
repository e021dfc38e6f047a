/* What this engine uses of ONNX Runtime's C interface, whose functions are found by their number in a table that only
 * ever grows at its end: the numbers below are of version 1 of the interface unless said otherwise.
 */
#ifndef FASTNNUNET_ORT_API_H
#define FASTNNUNET_ORT_API_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtValue OrtValue;

typedef struct OrtApiBase {
    const void* const* (*GetApi)(uint32_t version); /* the table, or null where the library is older */
    const char* (*GetVersionString)(void);
} OrtApiBase;

enum {
    ORT_API_VERSION_USED = 12,
    ORT_FLOAT = 1,            /* ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT */
    ORT_LOG_ERROR = 3,        /* ORT_LOGGING_LEVEL_ERROR */
    ORT_DEVICE_ALLOCATOR = 0, /* OrtDeviceAllocator */
    ORT_DEFAULT_MEMORY = 0    /* OrtMemTypeDefault */
};

/* numbers in the table */
enum {
    ORT_GetErrorMessage = 2,
    ORT_CreateEnv = 3,
    ORT_CreateSession = 7,
    ORT_Run = 9,
    ORT_CreateSessionOptions = 10,
    ORT_DisableMemPattern = 17,
    ORT_SetSessionLogSeverityLevel = 22,
    ORT_SetIntraOpNumThreads = 24,
    ORT_SetInterOpNumThreads = 25,
    ORT_SessionGetInputName = 36,
    ORT_SessionGetOutputName = 37,
    ORT_CreateTensorWithDataAsOrtValue = 49,
    ORT_CreateMemoryInfo = 68,
    ORT_AllocatorFree = 76,
    ORT_GetAllocatorWithDefaultOptions = 78,
    ORT_ReleaseStatus = 93,
    ORT_ReleaseMemoryInfo = 94,
    ORT_ReleaseSession = 95,
    ORT_ReleaseValue = 96,
    ORT_ReleaseSessionOptions = 100,
    ORT_GetAvailableProviders = 125,     /* since version 2 */
    ORT_ReleaseAvailableProviders = 126, /* since version 2 */
    ORT_AddSessionConfigEntry = 130,     /* since version 4 */
    ORT_AppendExecutionProvider = 216    /* since version 12: SessionOptionsAppendExecutionProvider */
};

#endif
