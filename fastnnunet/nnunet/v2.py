"""Everything of nnU-Net v2 that is used here, by name: its classes and functions, and what is relied on in them.

The other modules of this room take from here what they need (`from fastnnunet.nnunet.v2 import nnUNetTrainer`); it is
imported when it is asked for. `changes` compares the table with what is installed, and says what a new release of
theirs has moved or renamed. Strings that name their classes in files (plans, checkpoints) are data and stay where they
are read.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """Where a class or function of theirs is, and what of it is relied on."""

    module: str
    takes: tuple[str, ...] = ()  # parameters it is called with
    has: tuple[str, ...] = ()  # methods, properties and class attributes
    sets: tuple[str, ...] = ()  # attributes of its instances


_NNUNET, _TRANSFORMS = "nnunetv2", "batchgeneratorsv2.transforms"

NAMES: dict[str, Theirs] = {
    # plans and labels
    "PlansManager": Theirs(
        module=f"{_NNUNET}.utilities.plans_handling.plans_handler",
        takes=("plans_file_or_dict",),
        has=(
            "dataset_name", "plans_name", "transpose_forward", "transpose_backward", "image_reader_writer_class",
            "foreground_intensity_properties_per_channel", "get_configuration", "get_label_manager",
        ),
    ),
    "ConfigurationManager": Theirs(
        module=f"{_NNUNET}.utilities.plans_handling.plans_handler",
        has=(
            "patch_size", "spacing", "batch_size", "network_arch_class_name", "network_arch_init_kwargs",
            "network_arch_init_kwargs_req_import", "normalization_schemes", "use_mask_for_norm", "preprocessor_class",
            "resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities", "previous_stage_name",
            "data_identifier",
        ),
        sets=("configuration",),
    ),
    "LabelManager": Theirs(
        module=f"{_NNUNET}.utilities.label_handling.label_handling",
        has=(
            "has_regions", "has_ignore_label", "ignore_label", "foreground_labels", "foreground_regions", "all_labels",
            "num_segmentation_heads",
        ),
    ),
    "determine_num_input_channels": Theirs(
        module=f"{_NNUNET}.utilities.label_handling.label_handling",
        takes=("plans_manager", "configuration_or_config_manager", "dataset_json"),
    ),
    "convert_labelmap_to_one_hot": Theirs(
        module=f"{_NNUNET}.utilities.label_handling.label_handling",
        takes=("segmentation", "all_labels", "output_dtype"),
    ),
    "recursive_find_python_class": Theirs(
        module=f"{_NNUNET}.utilities.find_class_by_name", takes=("folder", "class_name", "current_module")
    ),
    "recursive_find_trainer_class_by_name": Theirs(module=f"{_NNUNET}.utilities.find_objects"),
    "generate_crossval_split": Theirs(module=f"{_NNUNET}.utilities.crossval_split"),
    # preprocessing and cases
    "extract_fingerprints": Theirs(module=f"{_NNUNET}.experiment_planning.plan_and_preprocess_api"),
    "plan_experiments": Theirs(module=f"{_NNUNET}.experiment_planning.plan_and_preprocess_api"),
    "preprocess": Theirs(module=f"{_NNUNET}.experiment_planning.plan_and_preprocess_api"),
    "DefaultPreprocessor": Theirs(
        module=f"{_NNUNET}.preprocessing.preprocessors.default_preprocessor", has=("run_case_npy",)
    ),
    "crop_to_nonzero": Theirs(module=f"{_NNUNET}.preprocessing.cropping.cropping"),
    "compute_new_shape": Theirs(module=f"{_NNUNET}.preprocessing.resampling.default_resampling"),
    "infer_dataset_class": Theirs(module=f"{_NNUNET}.training.dataloading.nnunet_dataset"),
    "nnUNetDatasetBlosc2": Theirs(
        module=f"{_NNUNET}.training.dataloading.nnunet_dataset", has=("save_seg", "save_case")
    ),
    "crop_and_pad_nd": Theirs(module="acvl_utils.cropping_and_padding.bounding_boxes", takes=("cast_cropped_to",)),
    # prediction, the reference
    "nnUNetPredictor": Theirs(
        module=f"{_NNUNET}.inference.predict_from_raw_data",
        takes=("tile_step_size", "use_mirroring", "perform_everything_on_device", "device", "verbose", "allow_tqdm"),
        has=(
            "initialize_from_trained_model_folder", "manual_initialization", "predict_logits_from_preprocessed_data",
        ),
        sets=("network", "plans_manager", "configuration_manager", "dataset_json", "label_manager", "device"),
    ),
    "convert_predicted_logits_to_segmentation_with_correct_shape": Theirs(
        module=f"{_NNUNET}.inference.export_prediction",
        takes=("predicted_logits", "plans_manager", "configuration_manager", "label_manager", "properties_dict"),
    ),
    "default_num_processes": Theirs(module=f"{_NNUNET}.configuration"),
    # training
    "nnUNetTrainer": Theirs(
        module=f"{_NNUNET}.training.nnUNetTrainer.nnUNetTrainer",
        takes=("plans", "configuration", "fold", "dataset_json", "device"),
        has=(
            "initialize", "configure_optimizers", "set_deep_supervision_enabled", "get_tr_and_val_datasets",
            "configure_rotation_dummyDA_mirroring_and_inital_patch_size", "get_dataloaders", "train_step",
            "validation_step", "perform_actual_validation", "on_train_start", "on_train_end", "on_train_epoch_end",
            "print_to_log_file", "plot_network_architecture", "save_checkpoint", "get_training_transforms",
            "get_validation_transforms", "_get_deep_supervision_scales",
        ),
        sets=(
            "network", "optimizer", "lr_scheduler", "loss", "logger", "device", "is_ddp", "is_cascaded", "batch_size",
            "current_epoch", "num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr",
            "weight_decay", "enable_deep_supervision", "inference_allowed_mirroring_axes", "grad_scaler", "_best_ema",
            "oversample_foreground_percent", "probabilistic_oversampling", "my_init_kwargs", "num_input_channels",
            "configuration_manager", "plans_manager", "label_manager", "output_folder", "dataset_class",
            "folder_with_segs_from_previous_stage", "configuration_name", "fold",
        ),
    ),
    "nnUNetTrainerDA5": Theirs(
        module=f"{_NNUNET}.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5",
        has=("get_training_transforms", "configure_rotation_dummyDA_mirroring_and_inital_patch_size"),
    ),
    "nnUNetDataLoader": Theirs(
        module=f"{_NNUNET}.training.dataloading.data_loader",
        takes=(
            "data", "batch_size", "patch_size", "final_patch_size", "label_manager", "oversample_foreground_percent",
            "probabilistic_oversampling",
        ),
        has=("get_indices", "get_bbox"),
        sets=("get_do_oversample", "batch_size", "patch_size_was_2d"),
    ),
    "PolyLRScheduler": Theirs(
        module=f"{_NNUNET}.training.lr_scheduler.polylr", takes=("optimizer", "initial_lr", "max_steps"),
        sets=("max_steps",),
    ),
    "DeepSupervisionWrapper": Theirs(module=f"{_NNUNET}.training.loss.deep_supervision", sets=("weight_factors",)),
    "get_allowed_n_proc_DA": Theirs(module=f"{_NNUNET}.utilities.default_n_proc_DA"),
    # networks
    "Primus": Theirs(module="dynamic_network_architectures.architectures.primus"),
    # augmentation
    "ComposeTransforms": Theirs(module=f"{_TRANSFORMS}.utils.compose", sets=("transforms",)),
    "RandomTransform": Theirs(module=f"{_TRANSFORMS}.utils.random", sets=("transform", "apply_probability")),
    "SpatialTransform": Theirs(
        module=f"{_TRANSFORMS}.spatial.spatial",
        has=("get_parameters", "_apply_to_image", "_apply_to_segmentation"),
        sets=("patch_size", "random_crop", "p_rotation", "p_scaling", "p_elastic_deform", "bg_style_seg_sampling"),
    ),
    "Convert3DTo2DTransform": Theirs(module=f"{_TRANSFORMS}.utils.pseudo2d"),
    "Convert2DTo3DTransform": Theirs(module=f"{_TRANSFORMS}.utils.pseudo2d"),
    "GaussianNoiseTransform": Theirs(module=f"{_TRANSFORMS}.intensity.gaussian_noise", has=("get_parameters",)),
    "GaussianBlurTransform": Theirs(module=f"{_TRANSFORMS}.noise.gaussian_blur", has=("get_parameters",)),
    "MultiplicativeBrightnessTransform": Theirs(
        module=f"{_TRANSFORMS}.intensity.brightness", has=("get_parameters",)
    ),
    "ContrastTransform": Theirs(module=f"{_TRANSFORMS}.intensity.contrast", has=("get_parameters",)),
    "GammaTransform": Theirs(module=f"{_TRANSFORMS}.intensity.gamma", has=("get_parameters",)),
    "SimulateLowResolutionTransform": Theirs(module=f"{_TRANSFORMS}.spatial.low_resolution", has=("get_parameters",)),
    "MirrorTransform": Theirs(
        module=f"{_TRANSFORMS}.spatial.mirroring", has=("get_parameters",), sets=("allowed_axes",)
    ),
    "DownsampleSegForDSTransform": Theirs(
        module=f"{_TRANSFORMS}.utils.deep_supervision_downsampling", sets=("ds_scales",)
    ),
    "MaskImageTransform": Theirs(module=f"{_TRANSFORMS}.utils.nnunet_masking"),
    "RemoveLabelTransform": Theirs(module=f"{_TRANSFORMS}.utils.remove_label"),
    "ConvertSegmentationToRegionsTransform": Theirs(module=f"{_TRANSFORMS}.utils.seg_to_regions", sets=("regions",)),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """One of theirs, imported now."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: what is used of theirs is in NAMES")
    return getattr(import_module(NAMES[name].module), name)


def find_below(package: str, name: str) -> Any:
    """What nnU-Net finds by this name below one of its packages; None where there is none."""
    find = __getattr__("recursive_find_python_class")
    return find(import_module(package).__path__[0], name, package)


def changes(names: Mapping[str, Theirs] = NAMES) -> list[str]:
    """What the installed packages no longer have, a line each; empty when all that is relied on is there."""
    found: list[str] = []
    for name, expected in names.items():
        where = f"{expected.module}.{name}"
        try:
            theirs = getattr(import_module(expected.module), name)
        except (ImportError, AttributeError) as e:
            found.append(f"{where} is gone: {e}")
            continue
        if expected.takes:
            there = inspect.signature(theirs).parameters
            found += [f"{where} takes no {p}; it takes {', '.join(there)}" for p in expected.takes if p not in there]
        found += [f"{where} has no {attribute}" for attribute in expected.has if not hasattr(theirs, attribute)]
        if expected.sets:
            source = "".join(inspect.getsource(kind) for kind in theirs.__mro__ if kind.__module__ != "builtins")
            found += [f"{where} sets no {a}" for a in expected.sets if not re.search(rf"\bself\.{a}\b", source)]
    return found
