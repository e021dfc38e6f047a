// Errors a user can mend. Messages are those of the Python runtime: what was wrong, got, expected, how to mend it.
#pragma once

#include <stdexcept>
#include <string>

#include "include/fastnnunet.h"

namespace fastnnunet::engine {

struct Error : std::runtime_error {
    Error(fastnnunet_status status, const std::string& message) : std::runtime_error(message), status(status) {}

    fastnnunet_status status;
};

#define FASTNNUNET_ERROR(Name, code)                                        \
    struct Name : Error {                                                   \
        explicit Name(const std::string& message) : Error(code, message) {} \
    }
FASTNNUNET_ERROR(SpecError, FASTNNUNET_BAD_OPTION);
FASTNNUNET_ERROR(NotFoundError, FASTNNUNET_NOT_FOUND);
FASTNNUNET_ERROR(CorruptError, FASTNNUNET_CORRUPT);
FASTNNUNET_ERROR(NewerFormatError, FASTNNUNET_NEWER_FORMAT);
FASTNNUNET_ERROR(BadImage, FASTNNUNET_BAD_IMAGE);
FASTNNUNET_ERROR(BackendError, FASTNNUNET_BACKEND);
FASTNNUNET_ERROR(NoRoomError, FASTNNUNET_NO_ROOM);
#undef FASTNNUNET_ERROR

// A network found no memory for a batch of that size.
struct NoMemoryError : BackendError {
    using BackendError::BackendError;
};

}  // namespace fastnnunet::engine
