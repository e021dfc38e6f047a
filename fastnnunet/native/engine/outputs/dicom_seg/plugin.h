/* What writes DICOM Segmentations: the interface of a plugin, libfastnnunet_dicomseg.so, which is built with DCMTK
 * (-DFASTNNUNET_DCMTK=ON) and opened when one is wanted. Plain C; no exception leaves it.
 */
#ifndef FASTNNUNET_DICOM_SEG_PLUGIN_H
#define FASTNNUNET_DICOM_SEG_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTNNUNET_DICOM_SEG_INTERFACE 1

/* A slice of the series; texts are UTF-8, "" where its header says nothing. */
typedef struct fastnnunet_seg_slice {
    const char *path, *storage_class, *sop_uid, *study_uid, *series_uid, *frame_uid, *modality;
    double position_mm[3]; /* LPS, of the centre of its first pixel */
} fastnnunet_seg_slice;

/* A label, or a region of several; numbered from 1 in their order. */
typedef struct fastnnunet_seg_structure {
    const char* name;
    const uint16_t* values; /* of its voxels */
    int64_t value_count;
} fastnnunet_seg_structure;

/* A segmentation to write. */
typedef struct fastnnunet_seg {
    size_t struct_size;
    const char* folder;                 /* of the series, for messages */
    const fastnnunet_seg_slice* slices; /* in their order: along the cross product of the two directions */
    int64_t slice_count;
    double orientation[6]; /* directions of rows and columns, LPS */
    double pixel_spacing_mm[2]; /* of rows, of columns */
    int32_t rows, columns;
    const fastnnunet_seg_structure* structures;
    int64_t structure_count;
    const char* model;    /* named as the algorithm */
    const char* version;  /* of this engine */
    int32_t is_label_map; /* 1: a frame for each slice (LABELMAP), 0: for each segment and slice (BINARY) */
    const void* labels;   /* slices, rows, columns, contiguous; NULL: nothing is written, the headers are checked */
    int32_t bytes_per_voxel; /* 1 (uint8) or 2 (uint16) */
    const char* file;        /* which is written from its beginning to its end */
} fastnnunet_seg;

/* What a call has to say. */
typedef struct fastnnunet_seg_said {
    char error[4096];  /* why it failed */
    char mended[8192]; /* what of the headers was not legal and how it was mended; "" for nothing */
} fastnnunet_seg_said;

/* A code as DICOM has it. */
typedef struct fastnnunet_seg_code {
    char value[17], scheme[17], meaning[65]; /* "" where there is none */
} fastnnunet_seg_code;

typedef struct fastnnunet_seg_writer {
    int32_t interface_version;
    /* Both return 0, or 1 and the reason. */
    int32_t (*write)(const fastnnunet_seg* segmentation, fastnnunet_seg_said* said);
    int32_t (*check_whole)(const char* file, fastnnunet_seg_said* said); /* that a segmentation is all there */
    /* By the words of a label's name: category, type, laterality, region. */
    void (*find_codes)(const char* name, fastnnunet_seg_code codes[4]);
} fastnnunet_seg_writer;

typedef const fastnnunet_seg_writer* (*fastnnunet_seg_entry)(void);
#define FASTNNUNET_SEG_ENTRY "fastnnunet_dicom_seg_entry"

#ifdef __cplusplus
}
#endif

#endif
