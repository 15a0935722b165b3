"""Processors of further families, which `processors.py` adds to its own."""

from collections.abc import Callable
from typing import Any

import transformers as hf

CHAT = (
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' }}}}{{% for c in m.content %}}"
    "{{% if c.type == 'image' %}}{{{{ '{image}' }}}}{{% elif c.type == 'video' %}}{{{{ '{video}' }}}}"
    "{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
CROP = {"height": 8, "width": 8}
SMALL = {"shortest_edge": 8 * 8, "longest_edge": 16 * 24}
NAMED = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
AROUND = {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("image", "video") for end in ("start", "end")}
Tokenizer = Callable[..., Any]


def more_processors(tokenizer: Tokenizer) -> dict[str, Callable[[], Any]]:
    """
    Args:
        tokenizer: makes a tokenizer of a template and of special tokens; see `processors.py`.
    """

    def words(chat: str = CHAT.format(image="<|image_pad|>", video="<|video_pad|>"), **named: str) -> Any:
        return tokenizer(chat, {**NAMED, **named})

    def glm() -> Any:
        image = hf.Glm4vImageProcessor(patch_size=4, size={"shortest_edge": 2 * 8 * 8, "longest_edge": 2 * 16 * 24})
        made = words()
        return hf.Glm4vProcessor(image, made, hf.Glm4vVideoProcessor(patch_size=4), chat_template=made.chat_template)

    def paddle() -> Any:
        around = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
        image, made = hf.PaddleOCRVLImageProcessor(patch_size=4, size=SMALL), words(**around)
        return hf.PaddleOCRVLProcessor(image, made, chat_template=made.chat_template)

    def exaone() -> Any:
        image = hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=SMALL)
        video, made = hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, size=SMALL), words()
        return hf.Exaone4_5_Processor(image, made, video, chat_template=made.chat_template)

    def kimi() -> Any:
        image = hf.Kimi_K25ImageProcessor(
            patch_size=4, merge_size=2, max_patches=24, size={"max_height": 4, "max_width": 4}
        )
        around = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
        made, video = words(**around), hf.Kimi_K25VideoProcessor(patch_size=4, merge_size=2)
        return hf.Kimi_K25Processor(image, made, video, chat_template=made.chat_template)

    def vipllava() -> Any:
        image, made = hf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=CROP), words()
        return hf.LlavaProcessor(
            image, made, patch_size=2, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=made.chat_template,
        )  # fmt: skip

    def cohere2() -> Any:
        image = hf.Cohere2VisionImageProcessor(size=CROP, crop_to_patches=True, max_patches=4, patch_size=2)
        made = words(boi_token="<|boi|>", eoi_token="<|eoi|>", img_line_break_token="<|line|>")
        return hf.Cohere2VisionProcessor(image, made, chat_template=made.chat_template)

    def lighton() -> Any:
        image = hf.PixtralImageProcessor(patch_size={"height": 4, "width": 4}, size={"longest_edge": 16})
        made = words(image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>")
        return hf.LightOnOcrProcessor(image, made, patch_size=2, spatial_merge_size=2, chat_template=made.chat_template)

    def qianfan() -> Any:
        image = hf.GotOcr2ImageProcessor(size=CROP, crop_to_patches=True, max_patches=4)
        named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        made = tokenizer(CHAT.format(image="<image>", video="<video>"), named, ("<image>",))
        return hf.QianfanOCRProcessor(image, made, image_seq_length=4, chat_template=made.chat_template)

    def deepseek() -> Any:
        image, made = hf.DeepseekVLImageProcessor(size=CROP, min_size=2), words()
        return hf.DeepseekVLProcessor(image, made, num_image_tokens=16, chat_template=made.chat_template)

    def janus() -> Any:
        image, made = hf.JanusImageProcessor(size=CROP, min_size=2), words(boi_token="<|boi|>", eoi_token="<|eoi|>")
        return hf.JanusProcessor(image, made, num_image_tokens=16, chat_template=made.chat_template)

    def hunyuan() -> Any:
        chat = CHAT.format(image="<|image_start|><|image_pad|><|image_end|>", video="")
        image, made = hf.HunYuanVLImageProcessor(patch_size=4, size=SMALL), words(chat, **AROUND)
        return hf.HunYuanVLProcessor(image, made, chat_template=made.chat_template)

    def ernie() -> Any:
        image, made = hf.Ernie4_5_VLMoeImageProcessor(patch_size=4, size=SMALL), words(**AROUND)
        video = hf.Ernie4_5_VLMoeVideoProcessor(patch_size=4, size=SMALL, draw_on_frames=False)
        return hf.Ernie4_5_VLMoeProcessor(image, made, video, chat_template=made.chat_template)

    def next_video() -> Any:
        image = hf.LlavaNextImageProcessor(
            size={"shortest_edge": 8}, crop_size=CROP, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]]
        )
        made = words()
        return hf.LlavaNextVideoProcessor(
            hf.LlavaNextVideoVideoProcessor(size={"shortest_edge": 8}, crop_size=CROP), image, made,
            chat_template=made.chat_template, patch_size=2, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip

    def hybrid() -> Any:
        image = hf.DeepseekVLHybridImageProcessor(size=CROP, high_res_size={"height": 32, "width": 32}, min_size=2)
        made = words()
        return hf.DeepseekVLHybridProcessor(image, made, num_image_tokens=16, chat_template=made.chat_template)

    def minicpm() -> Any:
        image = hf.MiniCPMV4_6ImageProcessor(patch_size=2, scale_resolution=16, max_slice_nums=4, use_image_id=False)
        video = hf.MiniCPMV4_6VideoProcessor(patch_size=2, scale_resolution=16)
        named = {f"{kind}_{end}_token": f"<{kind}_{end}>" for kind in ("image_id", "slice") for end in ("start", "end")}
        made = words(**AROUND, **named)
        return hf.MiniCPMV4_6Processor(image, video, made, chat_template=made.chat_template)

    def video_llama() -> Any:
        image, made = hf.VideoLlama3ImageProcessor(patch_size=4, size=SMALL), words()
        video = hf.VideoLlama3VideoProcessor(patch_size=4, size=SMALL)
        return hf.VideoLlama3Processor(image, made, video, chat_template=made.chat_template)

    def paligemma() -> Any:
        image = hf.SiglipImageProcessor(size=CROP)
        image.image_seq_length = 16
        return hf.PaliGemmaProcessor(image, tokenizer(None, {"image_token": "<image>"}))

    def mllama() -> Any:
        image = hf.MllamaImageProcessor(size=CROP, max_image_tiles=3, patch_size=4)
        chat = "{{ bos_token }}" + CHAT.format(image="<|image|>", video="")
        made = tokenizer(chat, {"image_token": "<|image|>"}, ("<|python_tag|>",))
        return hf.MllamaProcessor(image, made, chat_template=made.chat_template)

    def granite() -> Any:
        image = hf.LlavaNextImageProcessor(
            size={"shortest_edge": 8}, crop_size=CROP, image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]]
        )
        made = words()
        return hf.Granite4VisionProcessor(
            image, made, patch_size=2, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            downsample_rate="1/2", chat_template=made.chat_template,
        )  # fmt: skip

    def dots() -> Any:
        chat = CHAT.format(image="<|imgpad|>", video="<|video_pad|>")
        made = tokenizer(chat, {}, ("<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"))
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1, "size": SMALL}
        image, video = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen3VLVideoProcessor(**sizes)
        sound = hf.Dots3NoteFeatureExtractor(feature_size=8)
        return hf.Dots3NoteProcessor(image, made, video, sound, chat_template=chat)

    return {
        "granite4_vision": granite,
        "dots3_note": dots,
        "mllama": mllama,
        "deepseek_vl_hybrid": hybrid,
        "minicpmv4_6": minicpm,
        "video_llama_3": video_llama,
        "glm4v": glm,
        "paddleocr_vl": paddle,
        "exaone4_5": exaone,
        "kimi_k25": kimi,
        "vipllava": vipllava,
        "cohere2_vision": cohere2,
        "lighton_ocr": lighton,
        "qianfan_ocr": qianfan,
        "deepseek_vl": deepseek,
        "janus": janus,
        "hunyuan_vl": hunyuan,
        "ernie4_5_vl_moe": ernie,
        "llava_next_video": next_video,
        "paligemma": paligemma,
    }
