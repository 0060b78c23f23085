"""Texts as other tools write them into picture files, and the shared fields that they hold."""

import io
import json

from PIL import Image, PngImagePlugin

from sdjax import metadata

WEB_UI = (
    "masterpiece, (best quality:1.2)\n\\(series\\)\nNegative prompt: lowres,\nbad hands\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234, Size: 512x768, "
    'Model hash: 61e4567890, Model: v1-5, Lora hashes: "style: abc, other: def", Clip skip: 2, Version: 1.10'
)


def png(texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def with_exif(kind, *, comment=None, **tags):
    exif = Image.Exif()
    if comment is not None:
        exif[0x8769] = {0x9286: comment}
    for tag, text in tags.items():
        exif[{"model": 0x0110, "make": 0x010F, "software": 0x0131}[tag]] = text
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, kind, exif=exif.tobytes())
    return file.getvalue()


def read(folder, data):
    (folder / "picture").write_bytes(data)
    return metadata.read(folder / "picture")


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


COMFYUI = {
    "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.safetensors"),
    "10": node("LoraLoader", lora_name="toy.safetensors", strength_model=0.8, model=["4", 0], clip=["4", 1]),
    "11": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["10", 1]),
    "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "6": node("CLIPTextEncode", text=["12", 0], clip=["11", 0]),
    "12": node("PrimitiveString", value="a red toy"),
    "7": node("CLIPTextEncode", text="blurry", clip=["11", 0]),
    "13": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], image=["14", 0], strength=0.5),
    "14": node("LoadImage", image="edges.png"),
    "3": node(
        "KSampler",
        seed=156680208700286,
        steps=20,
        cfg=8,
        sampler_name="euler",
        scheduler="normal",
        denoise=1,
        model=["10", 0],
        positive=["13", 0],
        negative=["13", 1],
        latent_image=["5", 0],
    ),
    "20": node("LatentUpscale", width=1024, height=1536, samples=["3", 0]),
    "21": node(
        "KSampler",
        seed=9,
        steps=7,
        cfg=5,
        sampler_name="heun",
        scheduler="karras",
        denoise=0.5,
        model=["10", 0],
        positive=["6", 0],
        negative=["7", 0],
        latent_image=["20", 0],
    ),
    "8": node("VAEDecode", samples=["21", 0], vae=["4", 2]),
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}, "is_changed": [float("nan")]},
}
FROM_COMFYUI = {
    "prompt": "a red toy",
    "negative_prompt": "blurry",
    "steps": 20,
    "sampler": "euler",
    "schedule": "normal",
    "guidance_scale": 8.0,
    "seed": 156680208700286,
    "size": "512x768",
    "clip_skip": 1,
    "loras": "toy.safetensors:0.8",
    "model": "v1-5.safetensors",
    "tool": "ComfyUI",
}
CUSTOM = {
    "1": node("UNETLoader", unet_name="flux.safetensors"),
    "2": node("CLIPTextEncode", text="a boat", clip=["9", 0]),
    "3": node("FluxGuidance", conditioning=["2", 0], guidance=3.5),
    "4": node("BasicGuider", model=["1", 0], conditioning=["3", 0]),
    "5": node("RandomNoise", noise_seed=77),
    "6": node("KSamplerSelect", sampler_name="euler"),
    "7": node("BasicScheduler", scheduler="simple", steps=4, denoise=1, model=["1", 0]),
    "8": node("EmptySD3LatentImage", width=["10", 0], height=64, batch_size=1),
    "10": node("PrimitiveInt", value=128),
    "9": node("DualCLIPLoader", clip_name1="t5.safetensors"),
    "11": node(
        "SamplerCustomAdvanced",
        noise=["5", 0],
        guider=["4", 0],
        sampler=["6", 0],
        sigmas=["7", 0],
        latent_image=["8", 0],
    ),
}
TOOLS = {
    "comfyui": ({"prompt": json.dumps(COMFYUI), "workflow": '{"nodes": []}'}, FROM_COMFYUI),
    "comfyui, custom sampler": (
        {"prompt": json.dumps(CUSTOM)},
        {
            "prompt": "a boat",
            "negative_prompt": None,
            "steps": 4,
            "sampler": "euler",
            "schedule": "simple",
            "seed": 77,
            "size": "128x64",
            "model": "flux.safetensors",
            "tool": "ComfyUI",
        },
    ),
    "a node that saves the web UI's text": (
        {"parameters": WEB_UI, "prompt": json.dumps(COMFYUI)},
        metadata.from_text(WEB_UI),
    ),
    "invokeai": (
        {
            "invokeai_metadata": json.dumps(
                {
                    "generation_mode": "txt2img",
                    "positive_prompt": "a cat",
                    "negative_prompt": "dog",
                    "width": 512,
                    "height": 640,
                    "seed": 3,
                    "cfg_scale": 7.5,
                    "steps": 30,
                    "scheduler": "euler_a",
                    "clip_skip": 0,
                    "model": {"key": "k", "name": "Deliberate", "base": "sd-1"},
                    "loras": [{"model": {"name": "toy"}, "weight": 0.75}],
                    "app_version": "4.2.0",
                }
            ),
            "invokeai_graph": "{}",
        },
        {
            "prompt": "a cat",
            "negative_prompt": "dog",
            "steps": 30,
            "sampler": "euler_a",
            "guidance_scale": 7.5,
            "seed": 3,
            "size": "512x640",
            "loras": "toy:0.75",
            "model": "Deliberate",
            "generation_mode": "txt2img",
            "app_version": "4.2.0",
            "tool": "InvokeAI",
        },
    ),
    "invokeai before 3": (
        {
            "sd-metadata": json.dumps(
                {
                    "model_weights": "stable-diffusion-1.5",
                    "image": {
                        "prompt": [{"prompt": "a cat [dog]", "weight": 1.0}],
                        "steps": 50,
                        "cfg_scale": 7.5,
                        "sampler": "k_lms",
                        "seed": 3,
                        "width": 512,
                        "height": 512,
                    },
                }
            ),
            "Dream": '"a cat [dog]" -s 50',
        },
        {
            "prompt": "a cat [dog]",
            "negative_prompt": None,
            "steps": 50,
            "sampler": "k_lms",
            "guidance_scale": 7.5,
            "seed": 3,
            "size": "512x512",
            "model": "stable-diffusion-1.5",
            "tool": "InvokeAI",
        },
    ),
    "novelai": (
        {
            "Title": "NovelAI generated image",
            "Description": "1girl, {{masterpiece}}",
            "Software": "NovelAI",
            "Source": "NovelAI Diffusion V4.5 4BDE2A90",
            "Comment": json.dumps(
                {
                    "prompt": "1girl, {{masterpiece}}",
                    "uc": "lowres",
                    "seed": 1234567890,
                    "steps": 28,
                    "scale": 5,
                    "sampler": "k_euler_ancestral",
                    "noise_schedule": "karras",
                    "width": 832,
                    "height": 1216,
                    "cfg_rescale": 0.0,
                    "v4_prompt": {"caption": {}},
                }
            ),
        },
        {
            "prompt": "1girl, {{masterpiece}}",
            "negative_prompt": "lowres",
            "steps": 28,
            "sampler": "k_euler_ancestral",
            "schedule": "karras",
            "guidance_scale": 5.0,
            "seed": 1234567890,
            "size": "832x1216",
            "model": "NovelAI Diffusion V4.5 4BDE2A90",
            "cfg_rescale": "0.0",
            "tool": "NovelAI",
        },
    ),
    "swarmui": (
        {
            "parameters": json.dumps(
                {
                    "sui_image_params": {
                        "prompt": "a photo of a cat",
                        "negativeprompt": "dog",
                        "model": "OfficialStableDiffusion/sd_xl_base_1.0",
                        "seed": 1,
                        "steps": 20,
                        "cfgscale": 7.0,
                        "width": 1024,
                        "height": 832,
                        "sampler": "euler",
                        "scheduler": "normal",
                        "clipstopatlayer": -2,
                        "loras": ["toy", "pixel"],
                        "loraweights": ["0.5", "1"],
                        "swarm_version": "0.9.3.1",
                    },
                    "sui_extra_data": {"date": "2025-01-25"},
                }
            )
        },
        {
            "prompt": "a photo of a cat",
            "negative_prompt": "dog",
            "steps": 20,
            "sampler": "euler",
            "schedule": "normal",
            "guidance_scale": 7.0,
            "seed": 1,
            "size": "1024x832",
            "clip_skip": 1,
            "loras": "toy:0.5, pixel:1",
            "model": "OfficialStableDiffusion/sd_xl_base_1.0",
            "swarm_version": "0.9.3.1",
            "tool": "SwarmUI",
        },
    ),
    "fooocus": (
        {
            "fooocus_scheme": "fooocus",
            "parameters": json.dumps(
                {
                    "base_model": "juggernautXL_v8Rundiffusion",
                    "base_model_hash": "aeb7e9e689",
                    "guidance_scale": 4,
                    "loras": [["sd_xl_offset_example-lora_1.0", 0.1, "4852686128"]],
                    "metadata_scheme": "fooocus",
                    "negative_prompt": "",
                    "prompt": "A sunflower field",
                    "resolution": "(1152, 896)",
                    "sampler": "dpmpp_2m_sde_gpu",
                    "scheduler": "karras",
                    "seed": "127589946317439009",
                    "sharpness": 2,
                    "steps": 30,
                    "version": "Fooocus v2.5.5",
                }
            ),
        },
        {
            "prompt": "A sunflower field",
            "negative_prompt": None,
            "steps": 30,
            "sampler": "dpmpp_2m_sde_gpu",
            "schedule": "karras",
            "guidance_scale": 4.0,
            "seed": 127589946317439009,
            "size": "1152x896",
            "loras": "sd_xl_offset_example-lora_1.0:0.1",
            "model": "juggernautXL_v8Rundiffusion",
            "base_model_hash": "aeb7e9e689",
            "metadata_scheme": "fooocus",
            "sharpness": "2",
            "version": "Fooocus v2.5.5",
            "tool": "Fooocus",
        },
    ),
}
