/* Segments one image: predict BUNDLE OUTPUT CHANNEL_0 [CHANNEL_1 ...]
 *
 * cc predict.c -I../include -L../../../../build/engine/lib -lfastnnunet -o predict
 */
#include <stdio.h>

#include "fastnnunet.h"

static int show(void* user, int64_t done, int64_t total) {
    fprintf(stderr, "%s%lld of %lld tiles\n", (const char*)user, (long long)done, (long long)total);
    return 0; /* another value would end the prediction */
}

int main(int count, char** words) {
    if (count < 4) {
        fprintf(stderr, "usage: %s BUNDLE OUTPUT CHANNEL_0 [CHANNEL_1 ...]\n", words[0]);
        return 2;
    }
    fastnnunet_options options;
    fastnnunet_options_init(&options, sizeof options);
    fastnnunet_model* model = NULL;
    if (fastnnunet_load(words[1], &options, &model) != FASTNNUNET_OK) {
        fprintf(stderr, "error: %s\n", fastnnunet_last_error());
        return 2;
    }
    fastnnunet_files files;
    fastnnunet_files_init(&files, sizeof files);
    files.output = words[2];
    files.channels = (const char* const*)(words + 3);
    files.channel_count = count - 3;
    files.progress = show;
    files.user = "  ";
    const fastnnunet_status status = fastnnunet_predict_files(model, &files);
    if (status == FASTNNUNET_OK) {
        printf("%s: %s\n", words[2], fastnnunet_describe(model));
    } else {
        fprintf(stderr, "error: %s\n", fastnnunet_last_error());
    }
    fastnnunet_free(model);
    return status == FASTNNUNET_OK ? 0 : 2;
}
