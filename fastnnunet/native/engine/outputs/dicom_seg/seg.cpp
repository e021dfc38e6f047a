// A label map as a DICOM Segmentation that refers to the series it was made from (PS3.3 A.51), by DCMTK: what
// fastnnunet/outputs/dicom/seg.py makes by highdicom, attribute by attribute.

#include <array>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <vector>

#include "outputs/dicom_seg/codes.hpp"
#include "outputs/dicom_seg/headers.hpp"
#include "outputs/dicom_seg/segments.hpp"
#include "outputs/dicom_seg/values.hpp"

namespace fastnnunet::dicom_seg {
namespace {

const char* const kLabelMapStorage = "1.2.840.10008.5.1.4.1.1.66.7";

void put_number(DcmItem& item, const DcmTagKey& tag, unsigned number) {
    if (item.putAndInsertUint16(tag, static_cast<Uint16>(number)).bad()) throw Refused("DCMTK cannot set a number");
}

void put_tag(DcmItem& item, const DcmTagKey& tag, const DcmTagKey& pointer) {
    const Uint16 parts[] = {pointer.getGroup(), pointer.getElement()};
    auto value = std::make_unique<DcmAttributeTag>(DcmTag(tag));
    if (value->putUint16Array(parts, 1).bad() || item.insert(value.get(), OFTrue).bad()) {
        throw Refused("DCMTK cannot set a tag");
    }
    value.release();
}

void put_decimals(DcmItem& item, const DcmTagKey& tag, const double* numbers, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += (i > 0 ? "\\" : "") + decimal_string(numbers[i]);
    put(item, tag, text);
}

DcmItem& add_code(DcmItem& item, const DcmTagKey& sequence, const Code& code) {
    DcmItem& made = add_item(item, sequence);
    put(made, DCM_CodeValue, code.value);
    put(made, DCM_CodingSchemeDesignator, code.scheme);
    put(made, DCM_CodeMeaning, code.meaning);
    return made;
}

void put_now(DcmItem& item) {
    const std::time_t now = std::time(nullptr);
    std::tm parts{};
    localtime_r(&now, &parts);
    char date[16], time[16];
    std::strftime(date, sizeof date, "%Y%m%d", &parts);
    std::strftime(time, sizeof time, "%H%M%S", &parts);
    for (const DcmTagKey& tag : {DCM_InstanceCreationDate, DCM_ContentDate}) put(item, tag, date);
    for (const DcmTagKey& tag : {DCM_InstanceCreationTime, DCM_ContentTime}) put(item, tag, time);
}

class Writer {
public:
    Writer(const fastnnunet_seg& from, Headers& headers)
        : from_(from),
          headers_(headers),
          segments_(from),
          data_set_(*file_.getDataset()),
          model_(one_line(from.model)),
          is_label_map_(from.is_label_map != 0),
          is_of_one_(!is_label_map_ && from.structure_count == 1) {}

    void put_together() {
        const bool is_plain = take_over();
        put_general();
        put_references();
        put_equipment();
        put_pixels();
        for (std::int64_t s = is_label_map_ ? -1 : 0; s < from_.structure_count; ++s) add_segment(s);
        put_dimensions();
        put_shared();
        put_frames();
        if (!is_plain) put(data_set_, DCM_SpecificCharacterSet, "ISO_IR 192");
    }

    void save() {
        const OFCondition done =
            file_.saveFile(from_.file, EXS_LittleEndianExplicit, EET_ExplicitLength, EGL_recalcGL, EPD_withoutPadding);
        if (done.bad()) throw Refused(std::string("cannot write it: ") + done.text());
    }

private:
    static bool is_plain_text(DcmItem& item) {
        DcmStack stack;
        while (item.nextObject(stack, OFTrue).good()) {
            auto* element = dynamic_cast<DcmByteString*>(stack.top());
            char* text = nullptr;
            if (element != nullptr && element->getString(text).good() && text != nullptr && !is_ascii(text))
                return false;
        }
        return true;
    }

    bool take_over() {
        DcmItem& from = headers_.patient_and_study;
        bool is_plain = is_plain_text(from) && is_plain_text(headers_.equipment) && is_ascii(model_);
        for (std::int64_t s = 0; s < from_.structure_count; ++s)
            is_plain = is_plain && is_ascii(from_.structures[s].name);
        while (from.card() > 0) data_set_.insert(from.remove(0UL), OFTrue);
        return is_plain;
    }

    void put_general() {
        put(data_set_, DCM_ImageType, "DERIVED\\PRIMARY");
        put_now(data_set_);
        put(data_set_, DCM_SOPClassUID, is_label_map_ ? kLabelMapStorage : UID_SegmentationStorage);
        put(data_set_, DCM_SOPInstanceUID, new_uid());
        put(data_set_, DCM_StudyInstanceUID, headers_.study_uid);
        put(data_set_, DCM_SeriesInstanceUID, new_uid());
        put(data_set_, DCM_FrameOfReferenceUID, headers_.frame_uid);
        put(data_set_, DCM_PositionReferenceIndicator, "");
        put(data_set_, DCM_Modality, "SEG");
        put(data_set_, DCM_SeriesNumber, std::to_string(headers_.series_number));
        put(data_set_, DCM_InstanceNumber, "1");
        put(data_set_, DCM_Manufacturer, "FastnnUNet");
        put(data_set_, DCM_ManufacturerModelName, "FastnnUNet");
        put(data_set_, DCM_SoftwareVersions, from_.version);
        put(data_set_, DCM_DeviceSerialNumber, "0");
        const std::string description = one_line("Segmentation by " + model_);
        put(data_set_, DCM_SeriesDescription, description);
        put(data_set_, DCM_ContentLabel, "SEGMENTATION");
        put(data_set_, DCM_ContentDescription, description);
    }

    void refer(DcmItem& item, std::int64_t slice) const {
        put(item, DCM_ReferencedSOPClassUID, headers_.storage_classes[static_cast<std::size_t>(slice)]);
        put(item, DCM_ReferencedSOPInstanceUID, from_.slices[slice].sop_uid);
    }

    void put_references() {
        DcmItem& series = add_item(data_set_, DCM_ReferencedSeriesSequence);
        put(series, DCM_SeriesInstanceUID, headers_.series_uid);
        for (std::int64_t slice = 0; slice < from_.slice_count; ++slice) {
            refer(add_item(series, DCM_ReferencedInstanceSequence), slice);
            refer(add_item(data_set_, DCM_SourceImageSequence), slice);
        }
    }

    void put_equipment() {
        if (DcmItem& from = headers_.equipment; from.card() > 0) {
            DcmItem& scanner = add_item(data_set_, DCM_ContributingEquipmentSequence);
            while (from.card() > 0) scanner.insert(from.remove(0UL), OFTrue);
            put(scanner, DCM_ContributionDescription, "Acquisition equipment of the source image(s)");
            add_code(scanner, DCM_PurposeOfReferenceCodeSequence, {"109101", "DCM", "Acquisition Equipment"});
        }
        DcmItem& library = add_item(data_set_, DCM_ContributingEquipmentSequence);
        put(library, DCM_Manufacturer, "OFFIS e.V.");
        put(library, DCM_ManufacturerModelName, "DCMTK");
        put(library, DCM_SoftwareVersions, OFFIS_DCMTK_VERSION_STRING);
        put(library, DCM_ContributionDescription, "Software library used to create this instance");
        add_code(library, DCM_PurposeOfReferenceCodeSequence, {"109102", "DCM", "Processing Equipment"});
    }

    void put_pixels() {
        const unsigned bits = !is_label_map_ ? 1 : from_.structure_count < 256 ? 8 : 16;
        put_number(data_set_, DCM_SamplesPerPixel, 1);
        put(data_set_, DCM_PhotometricInterpretation, "MONOCHROME2");
        put(data_set_, DCM_NumberOfFrames, std::to_string(segments_.frames().size()));
        put_number(data_set_, DCM_Rows, static_cast<unsigned>(from_.rows));
        put_number(data_set_, DCM_Columns, static_cast<unsigned>(from_.columns));
        put_number(data_set_, DCM_BitsAllocated, bits);
        put_number(data_set_, DCM_BitsStored, bits);
        put_number(data_set_, DCM_HighBit, bits - 1);
        put_number(data_set_, DCM_PixelRepresentation, 0);
        if (is_label_map_) put_number(data_set_, DCM_PixelPaddingValue, 0);
        put(data_set_, DCM_LossyImageCompression, "00");
        put(data_set_, DCM_PresentationLUTShape, "IDENTITY");
        put(data_set_, DCM_SegmentationType, is_label_map_ ? "LABELMAP" : "BINARY");
        put(data_set_, DcmTagKey(0x0062, 0x0013), segments_.overlap() ? "YES" : "NO");
        const std::uint64_t count = segments_.frames().size() * static_cast<std::uint64_t>(segments_.pixels());
        std::uint64_t bytes = (count * bits + 7) / 8;
        bytes += bytes % 2;
        if (bytes >= std::numeric_limits<Uint32>::max()) {
            throw Refused("the segmentation has " + std::to_string(bytes) + " bytes, more than a DICOM file holds\n" +
                          "write images, or predict fewer labels");
        }
        auto pixels = std::make_unique<DcmPixelData>(DcmTag(DCM_PixelData, bits <= 8 ? EVR_OB : EVR_OW));
        if (bits == 16) {
            Uint16* to = nullptr;
            check(pixels->createUint16Array(static_cast<Uint32>(bytes / 2), to));
            fill([&](std::uint64_t at, unsigned number) { to[at] = static_cast<Uint16>(number); });
        } else {
            Uint8* to = nullptr;
            check(pixels->createUint8Array(static_cast<Uint32>(bytes), to));
            std::memset(to, 0, bytes);
            if (bits == 8) {
                fill([&](std::uint64_t at, unsigned number) { to[at] = static_cast<Uint8>(number); });
            } else {  // the lowest bit first, frames behind each other without a gap
                fill([&](std::uint64_t at, unsigned is_set) { to[at / 8] |= static_cast<Uint8>(is_set << at % 8); });
            }
        }
        check(data_set_.insert(pixels.get(), OFTrue));
        pixels.release();
    }

    static void check(const OFCondition& condition) {
        if (condition.bad()) throw Refused(std::string("DCMTK cannot hold its pixels: ") + condition.text());
    }

    // set(index of a pixel, its value) for all frames
    template <class Set>
    void fill(const Set& set) const {
        std::uint64_t at = 0;
        for (const Frame& frame : segments_.frames()) {
            for (std::int64_t pixel = 0; pixel < segments_.pixels(); ++pixel) {
                const unsigned label = segments_.label(frame.slice, pixel);
                set(at++, is_label_map_ ? segments_.number_of(label) : segments_.is_of(frame.structure, label));
            }
        }
    }

    // Of a structure from 0; -1: the background of a label map
    void add_segment(std::int64_t structure) {
        const auto number = static_cast<unsigned>(structure + 1);
        const bool is_background = structure < 0;
        const std::string given = is_background ? "Background" : from_.structures[structure].name;
        const std::string line = one_line(given), name = line.empty() ? std::to_string(number) : line;
        const std::string algorithm = one_line("FastnnUNet " + model_);
        const Code background{"125040", "DCM", "Background"};
        const Codes codes = is_background ? Codes{background, background, {}, {}} : codes_of_name(given);
        DcmItem& segment = add_item(data_set_, DCM_SegmentSequence);
        put_number(segment, DCM_SegmentNumber, number);
        put(segment, DCM_SegmentLabel, name);
        put(segment, DCM_SegmentAlgorithmType, "AUTOMATIC");
        put(segment, DCM_SegmentAlgorithmName, algorithm);
        add_code(segment, DCM_SegmentedPropertyCategoryCodeSequence, codes.category);
        DcmItem& type = add_code(segment, DCM_SegmentedPropertyTypeCodeSequence, codes.type);
        const auto colour = is_background ? std::array<Uint16, 3>{0, 32896, 32896} : cielab(static_cast<int>(number));
        check(segment.putAndInsertUint16Array(DCM_RecommendedDisplayCIELabValue, colour.data(), 3));
        if (is_background) return;
        DcmItem& made_by = add_item(segment, DCM_SegmentationAlgorithmIdentificationSequence);
        add_code(made_by, DCM_AlgorithmFamilyCodeSequence, {"123109", "DCM", "Artificial Intelligence"});
        put(made_by, DCM_AlgorithmName, algorithm);
        put(made_by, DCM_AlgorithmVersion, from_.version);
        put(segment, DCM_TrackingID, one_line(std::to_string(number) + " " + name));
        put(segment, DCM_TrackingUID, new_uid());
        if (!codes.region.is_none()) {
            DcmItem& region = add_code(segment, DCM_AnatomicRegionSequence, codes.region);
            if (!codes.laterality.is_none()) add_code(region, DCM_AnatomicRegionModifierSequence, codes.laterality);
        } else if (!codes.laterality.is_none()) {
            add_code(type, DCM_SegmentedPropertyTypeModifierCodeSequence, codes.laterality);
        }
    }

    void put_dimensions() {
        const std::string uid = new_uid();
        put(add_item(data_set_, DCM_DimensionOrganizationSequence), DCM_DimensionOrganizationUID, uid);
        const auto add = [&](const DcmTagKey& index, const DcmTagKey& group, const char* label) {
            DcmItem& item = add_item(data_set_, DCM_DimensionIndexSequence);
            put(item, DCM_DimensionOrganizationUID, uid);
            put_tag(item, DCM_DimensionIndexPointer, index);
            put_tag(item, DCM_FunctionalGroupPointer, group);
            put(item, DCM_DimensionDescriptionLabel, label);
        };
        if (!is_label_map_) {
            add(DCM_ReferencedSegmentNumber, DCM_SegmentIdentificationSequence, "Referenced Segment Number");
        }
        add(DCM_ImagePositionPatient, DCM_PlanePositionSequence, "Image Position Patient");
        const auto& frames = segments_.frames();
        if (frames.size() < 2 || !(is_label_map_ || is_of_one_)) return;
        const std::int64_t step = frames[0].slice - frames[1].slice;
        for (std::size_t i = 2; i < frames.size(); ++i) {
            if (frames[i - 1].slice - frames[i].slice != step) return;
        }
        put(data_set_, DCM_DimensionOrganizationType, "3D");
    }

    void put_shared() {
        DcmItem& shared = add_item(data_set_, DCM_SharedFunctionalGroupsSequence);
        put_decimals(add_item(shared, DCM_PlaneOrientationSequence), DCM_ImageOrientationPatient, from_.orientation, 6);
        DcmItem& measures = add_item(shared, DCM_PixelMeasuresSequence);
        put_decimals(measures, DCM_SliceThickness, &headers_.thickness_mm, 1);
        put_decimals(measures, DCM_SpacingBetweenSlices, &headers_.spacing_mm, 1);
        put_decimals(measures, DCM_PixelSpacing, from_.pixel_spacing_mm, 2);
        if (is_of_one_) identify(shared, 1);
    }

    static void identify(DcmItem& groups, unsigned segment) {
        put_number(add_item(groups, DCM_SegmentIdentificationSequence), DCM_ReferencedSegmentNumber, segment);
    }

    void put_frames() {
        std::vector<Uint32> place(static_cast<std::size_t>(from_.slice_count),
                                  0);  // from 1, of the slices that have a frame
        for (const Frame& frame : segments_.frames()) place[static_cast<std::size_t>(frame.slice)] = 1;
        Uint32 count = 0;
        for (auto slice = place.rbegin(); slice != place.rend(); ++slice) *slice = *slice > 0 ? ++count : 0;
        auto sequence = std::make_unique<DcmSequenceOfItems>(DcmTag(DCM_PerFrameFunctionalGroupsSequence));
        for (const Frame& frame : segments_.frames()) {
            auto item = std::make_unique<DcmItem>(DcmTag(DCM_Item));
            const auto number = static_cast<Uint32>(frame.structure + 1);
            DcmItem& derivation = add_item(*item, DCM_DerivationImageSequence);
            DcmItem& source = add_item(derivation, DCM_SourceImageSequence);
            refer(source, frame.slice);
            put(source, DCM_SpatialLocationsPreserved, "YES");
            add_code(source, DCM_PurposeOfReferenceCodeSequence,
                     {"121322", "DCM", "Source image for image processing operation"});
            add_code(derivation, DCM_DerivationCodeSequence, {"113076", "DCM", "Segmentation"});
            const Uint32 at = place[static_cast<std::size_t>(frame.slice)];
            const Uint32 indices[] = {is_label_map_ ? at : number, at};
            check(add_item(*item, DCM_FrameContentSequence)
                      .putAndInsertUint32Array(DCM_DimensionIndexValues, indices, is_label_map_ ? 1 : 2));
            put_decimals(add_item(*item, DCM_PlanePositionSequence), DCM_ImagePositionPatient,
                         from_.slices[frame.slice].position_mm, 3);
            if (!is_label_map_ && !is_of_one_) identify(*item, number);
            check(sequence->append(item.get()));
            item.release();
        }
        check(data_set_.insert(sequence.get(), OFTrue));
        sequence.release();
    }

    const fastnnunet_seg& from_;
    Headers& headers_;
    const Segments segments_;
    DcmFileFormat file_;
    DcmItem& data_set_;
    const std::string model_;
    const bool is_label_map_, is_of_one_;  // what all frames share is said once
};

void say(char* to, std::size_t size, const std::string& text) { std::snprintf(to, size, "%s", text.c_str()); }

template <class Body>
std::int32_t guarded(fastnnunet_seg_said* said, const Body& body) noexcept {
    said->error[0] = said->mended[0] = '\0';
    try {
        OFLog::configure(OFLogger::OFF_LOG_LEVEL);
        if (!dcmDataDict.isDictionaryLoaded()) {
            throw Refused(
                "DCMTK finds no dictionary of DICOM\ninstall it (Debian: libdcmtk17), or name its dicom.dic with "
                "DCMDICTPATH");
        }
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        say(said->error, sizeof said->error, "not enough memory\nclose other programs, or crop the image");
    } catch (const std::exception& e) {
        say(said->error, sizeof said->error, e.what());
    } catch (...) {
        say(said->error, sizeof said->error, "an exception of a type that is not known");
    }
    return 1;
}

std::int32_t write(const fastnnunet_seg* segmentation, fastnnunet_seg_said* said) {
    return guarded(said, [&] {
        Headers headers = read_headers(*segmentation);
        say(said->mended, sizeof said->mended, headers.notes.text());
        if (segmentation->labels == nullptr) return;
        Writer writer(*segmentation, headers);
        writer.put_together();
        writer.save();
    });
}

std::int32_t check_whole(const char* path, fastnnunet_seg_said* said) {
    return guarded(said, [&] {
        DcmFileFormat file;
        const OFCondition read = file.loadFile(path);
        DcmElement* pixels = nullptr;
        if (read.bad()) throw Refused(read.text());
        DcmItem& data_set = *file.getDataset();
        Uint16 rows = 0, columns = 0, bits = 0;
        Sint32 frames = 0;
        data_set.findAndGetUint16(DCM_Rows, rows);
        data_set.findAndGetUint16(DCM_Columns, columns);
        data_set.findAndGetUint16(DCM_BitsAllocated, bits);
        data_set.findAndGetSint32(DCM_NumberOfFrames, frames);
        const std::uint64_t expected =
            (std::uint64_t{rows} * columns * static_cast<std::uint64_t>(frames) * bits + 7) / 8;
        if (data_set.findAndGetElement(DCM_PixelData, pixels).bad() || pixels->getLength() < expected) {
            throw Refused("it has fewer pixels than its header says");
        }
    });
}

void find_codes(const char* name, fastnnunet_seg_code codes[4]) {
    const Codes found = codes_of_name(name);
    const Code* const all[] = {&found.category, &found.type, &found.laterality, &found.region};
    for (int i = 0; i < 4; ++i) {
        say(codes[i].value, sizeof codes[i].value, all[i]->value);
        say(codes[i].scheme, sizeof codes[i].scheme, all[i]->scheme);
        say(codes[i].meaning, sizeof codes[i].meaning, all[i]->meaning);
    }
}

}  // namespace
}  // namespace fastnnunet::dicom_seg

extern "C" __attribute__((visibility("default"))) const fastnnunet_seg_writer* fastnnunet_dicom_seg_entry() {
    static const fastnnunet_seg_writer writer{FASTNNUNET_DICOM_SEG_INTERFACE, fastnnunet::dicom_seg::write,
                                              fastnnunet::dicom_seg::check_whole, fastnnunet::dicom_seg::find_codes};
    return &writer;
}
