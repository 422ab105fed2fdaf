"""Backbones of keras-hub for images, built small from keyword arguments."""

from typing import Any

import keras
from keras_hub import models

from experiments.verify.zoos import draws
from experiments.verify.zoos.hub_text import LENGTH, WORDS
from experiments.verify.zoos.member import Member

VIT: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8}
"""Two heads of four numbers, so that the scale of the scores, 1/2, is the same number in any dtype."""


def siglip() -> keras.Model:
    """An encoder of images and one of text, and how well each pair of them fits."""
    vision = models.SigLIPVisionEncoder(patch_size=4, intermediate_dim=12, image_shape=(8, 8, 3), **VIT)
    text = models.SigLIPTextEncoder(
        vocabulary_size=WORDS, embedding_dim=8, intermediate_dim=12, max_sequence_length=LENGTH, **VIT
    )
    return models.SigLIPBackbone(vision, text)


def stable_diffusion() -> keras.Model:
    """The diffusion transformer of Stable Diffusion 3, without the encoders and the autoencoder around it."""
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT  # it has no public name

    return MMDiT(
        patch_size=2,
        position_size=4,
        latent_shape=(4, 4, 2),
        context_shape=(None, 6),
        pooled_projection_shape=(5,),
        **VIT,
    )


def _backbone(name: str, size: int, label: str | None = None, key: str | None = None, **arguments: Any) -> Member:
    image = draws.normal(size, size, 3)

    def make() -> keras.Model:
        return getattr(models, f"{name}Backbone")(**arguments)

    return Member(label or name, make, draws.named(**{key: image}) if key else image)


MEMBERS = (
    _backbone("ViT", 8, image_shape=(8, 8, 3), patch_size=4, mlp_dim=12, **VIT),
    _backbone("DeiT", 8, image_shape=(8, 8, 3), patch_size=4, intermediate_dim=12, **VIT),
    _backbone(
        "DINOV2",
        8,
        key="images",
        patch_size=4,
        intermediate_dim=12,
        num_register_tokens=1,
        image_shape=(8, 8, 3),
        position_embedding_shape=(8, 8),
        **VIT,
    ),
    Member("SigLIP", siglip, draws.named(images=draws.normal(8, 8, 3), token_ids=draws.whole(WORDS, LENGTH))),
    _backbone(
        "MiT",
        16,
        image_shape=(16, 16, 3),
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        hidden_dims=[4, 8],
    ),
    _backbone(
        "ViTDet",
        16,
        "SAM's image encoder",
        image_shape=(16, 16, 3),
        patch_size=4,
        hidden_size=8,
        num_layers=2,
        global_attention_layer_indices=[1],
        intermediate_dim=12,
        num_heads=2,
        num_output_channels=4,
        window_size=3,
    ),
    _backbone(
        "ResNet",
        16,
        "ResNetV2",
        image_shape=(16, 16, 3),
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        use_pre_activation=True,
    ),
    _backbone("DenseNet", 32, image_shape=(32, 32, 3), stackwise_num_repeats=[2, 2], growth_rate=4),
    _backbone(
        "EfficientNet",
        16,
        input_shape=(16, 16, 3),
        stackwise_width_coefficients=[1.0] * 2,
        stackwise_depth_coefficients=[1.0] * 2,
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 8],
        stackwise_expansion_ratios=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["fused", "unfused"],
        stackwise_force_input_filters=[0, 0],
        stackwise_nores_option=[False, False],
    ),
    _backbone(
        "CSPNet",
        32,
        image_shape=(32, 32, 3),
        stem_filters=4,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=[1, 2],
        stackwise_num_filters=[4, 8],
        block_type="dark_block",
        stage_type="csp",
        bottle_ratio=[0.5],
        block_ratio=[1.0],
        expand_ratio=[2.0],
    ),
    _backbone(
        "MobileNet",
        32,
        image_shape=(32, 32, 3),
        stackwise_expansion=[[8], [12]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [8]],
        stackwise_kernel_size=[[3], [5]],
        stackwise_num_strides=[[2], [1]],
        stackwise_se_ratio=[[None], [0.25]],
        stackwise_activation=[["relu"], ["hard_swish"]],
        stackwise_padding=[[1], [2]],
        output_num_filters=8,
        input_activation="hard_swish",
        output_activation="hard_swish",
        input_num_filters=8,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=True,
        last_layer_filter=8,
        squeeze_and_excite=0.5,
    ),
    Member(
        "Stable Diffusion 3",
        stable_diffusion,
        draws.named(
            latent=draws.normal(4, 4, 2),
            context=draws.normal(3, 6),
            pooled_projection=draws.normal(5),
            timestep=draws.uniform(1),
        ),
    ),
)
