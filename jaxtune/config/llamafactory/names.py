"""What LLaMA-Factory's keys are that `llamafactory.py` does not translate: those without a meaning here, which are
noted, and those that would change what is trained, which are refused; and the names of its chat templates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_NOTED = {
    "attention is exact whatever computes it": "flash_attn",
    "a speed-up of another runtime; the step is compiled as a whole": (
        "enable_liger_kernel liger_kernel_config torch_compile torch_compile_backend torch_compile_mode torchdynamo "
        "use_kt use_liger_kernel use_unsloth use_v1_kernels kt_expert_checkpoint_path kt_lora_expert_intermediate_size "
        "kt_lora_expert_num kt_use_lora_experts kt_weight_path tf32"
    ),
    "recomputing in the backward pass is train.remat, and gives the same result": (
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
        "gradient_checkpointing_kwargs use_reentrant_gc use_unsloth_gc"
    ),
    "devices share the work by mesh: mesh.fsdp=-1, the default, splits weights and optimiser's state over all": (
        "accelerator_config ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters "
        "ddp_static_graph ddp_timeout debug deepspeed fsdp fsdp_config hyper_parallel_args local_rank master_addr "
        "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap master_port parallelism_config "
        "ray_init_kwargs ray_num_workers use_hyper_parallel use_mca"
    ),
    "no code that comes with a model or data is ever run; families that are known here need none": (
        "trust_remote_code"
    ),
    "TensorBoard events, metrics.jsonl and loss.png are always written, and sent nowhere": (
        "include_effective_tokens_per_second include_num_input_tokens_seen include_tokens_per_second log_level "
        "log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter plot_loss "
        "swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode "
        "swanlab_project swanlab_run_name swanlab_workspace use_swanlab print_param_status disable_tqdm"
    ),
    "Trackio's place is set by TRACKIO_SPACE_ID": "trackio_bucket_id trackio_space_id trackio_static_space_id",
    "nothing is uploaded by itself; `jaxtune push RUN OWNER/NAME` does": (
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token push_to_hub "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token"
    ),
    "hub files are kept in HF_HOME, and `hf auth login` signs in; other hubs' files want a local folder": (
        "cache_dir hf_hub_token ms_hub_token om_hub_token"
    ),
    "tokens are kept by a hash of all that they depend on, so they are never stale; data.cache=false keeps none": (
        "overwrite_cache data_shared_file_system preprocessing_batch_size"
    ),
    "the batches' rows are read and laid out here by threads of its own": (
        "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
        "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor group_by_length "
        "length_column_name remove_unused_columns sortish_sampler train_sampling_strategy label_names"
    ),
    "profiling is JAX's: jax.profiler.trace": (
        "enable_torch_profiler profile_modules profiler_active_steps profiler_output_dir profiler_profile_memory "
        "profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps profiler_with_stack"
    ),
    "the numbers do not depend on it here": (
        "auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16_full_eval double_quantization "
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object fp16_full_eval full_determinism "
        "include_for_metrics include_inputs_for_metrics jit_mode_eval low_cpu_mem_usage offload_folder past_index "
        "prediction_loss_only quantization_device_map skip_memory_metrics torch_empty_cache_steps upcast_layernorm "
        "upcast_lmhead_output use_cache use_cpu use_fast_tokenizer use_ipex use_kv_cache no_cuda use_mps_device "
        "use_legacy_prediction_loop tpu_metrics_debug tpu_num_cores "
        "half_precision_backend fp16_backend fp16_opt_level mp_parameters ray_scope"
    ),
    "trained weights are float32 and the rest bfloat16 here; FP8 is a speed-up of some GPUs": (
        "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather"
    ),
    "checkpoints hold all that a run needs to go on exactly, at every host": (
        "enable_jit_checkpoint ignore_data_skip restore_callback_states_from_checkpoint save_on_each_node "
        "save_only_model save_safetensors"
    ),
    "models and data are text only": (
        "audio_sampling_rate crop_to_patches freeze_multi_modal_projector freeze_vision_tower image_do_pan_and_scan "
        "image_max_pixels image_min_pixels media_dir use_audio_in_video video_fps video_max_pixels video_maxlen "
        "video_min_pixels"
    ),
    "token accuracy is always measured": "compute_accuracy",
    "there is one evaluation over all sets; `jaxtune evaluate RUN FILE` measures one": "eval_on_each_dataset",
    "evaluations run at step 0, by evaluate.every, and at the end": "do_eval eval_delay eval_on_start",
    "whether more is better is known of every metric": "greater_is_better",
    "adapters are not put on embeddings here, so there are none to give this learning rate": "loraplus_lr_embedding",
    "the singular vectors are computed exactly": "pissa_iter",
    "an export of PiSSA loads on the original base at once": "pissa_convert",
    "answers are scored by `jaxtune evaluate RUN FILE --task NAME`, and written by `jaxtune predict RUN FILE`": (
        "do_predict predict_with_generate eval_num_beams generation_max_length generation_num_beams generation_config"
    ),
    "sampling belongs to `jaxtune chat` and `jaxtune predict`, as options of the same names": (
        "do_sample length_penalty max_length max_new_tokens num_beams repetition_penalty skip_special_tokens "
        "temperature top_k top_p"
    ),
    "serving is none of training's keys; `jaxtune chat RUN` talks to the result": (
        "infer_backend infer_dtype sglang_config sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size "
        "vllm_config vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank vllm_maxlen"
    ),
    "exporting is `jaxtune merge`'s and `jaxtune convert`'s": (
        "export_device export_hub_model_id export_legacy_format export_quantization_bit export_quantization_dataset "
        "export_quantization_maxlen export_quantization_nsamples export_size"
    ),
    "belongs to a stage or method that is not used": (
        "apollo_layerwise apollo_proj apollo_proj_type apollo_rank apollo_scale apollo_scale_front apollo_scale_type "
        "apollo_target apollo_update_interval asft_alpha badam_mask_mode badam_mode badam_start_block "
        "badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose dpo_label_smoothing eaft_alpha "
        "kto_chosen_weight kto_rejected_weight ld_alpha module_dropout oft_block_size oft_rank oft_target "
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards pref_bco_weight pref_beta pref_ftx "
        "pref_loss ref_model ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type simpo_gamma"
    ),
    "weights are updated all at once; state is split over the devices by mesh.fsdp": "galore_layerwise",
}  # fmt: skip
NOTED: Mapping[str, str] = {key: text for text, keys in _NOTED.items() for key in keys.split()}
SECRET = frozenset({"hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token", "swanlab_api_key"})


TRANSLATED = frozenset(
    "adam_beta1 adam_beta2 adam_epsilon adapter_name_or_path add_special_tokens add_tokens additional_target bf16 "
    "buffer_size create_new_adapter cutoff_len data_seed dataset dataset_dir default_system "
    "disable_gradient_checkpointing do_train early_stopping_steps enable_thinking eval_dataset eval_steps "
    "eval_strategy export_dir finetuning_type fp16 freeze_extra_modules freeze_trainable_layers "
    "freeze_trainable_modules galore_proj_type galore_rank galore_scale galore_target galore_update_interval "
    "gradient_accumulation_steps interleave_probs learning_rate load_best_model_at_end "
    "logging_steps logging_strategy lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio "
    "lr_scheduler_kwargs lr_scheduler_type mask_history max_grad_norm max_samples max_steps metric_for_best_model "
    "mix_strategy model_name_or_path moe_aux_loss_coef neat_packing neftune_noise_alpha num_train_epochs optim "
    "output_dir overwrite_output_dir packing per_device_eval_batch_size per_device_train_batch_size pissa_init "
    "preprocessing_num_workers preserve_thinking project pure_bf16 quantization_bit quantization_method "
    "quantization_type report_to resize_vocab resume_from_checkpoint run_name save_steps save_strategy "
    "save_total_limit seed stage streaming template tokenized_path train_on_prompt use_dora use_galore use_muon "
    "use_rslora val_size warmup_ratio warmup_steps weight_decay".split()
)


class Refusal(NamedTuple):
    """A key that changes what is trained: the values that ask for nothing, and what to take instead."""

    inert: tuple[Any, ...]
    instead: str


_OFF = (False,)
REFUSED: Mapping[str, Refusal] = {
    "use_badam": Refusal(_OFF, "the nearest is tuning.method=lisa, which also trains few layers at a time"),
    "use_apollo": Refusal(_OFF, "the nearest is use_galore=true, which also projects gradients"),
    "use_adam_mini": Refusal(_OFF, "the nearest is optim=adamw_8bit, whose state is small too"),
    "use_llama_pro": Refusal(_OFF, "the nearest is finetuning_type=freeze"),
    "use_dft_loss": Refusal(_OFF, "the loss is cross-entropy"),
    "use_asft_loss": Refusal(_OFF, "the loss is cross-entropy"),
    "use_eaft_loss": Refusal(_OFF, "the loss is cross-entropy"),
    "label_smoothing_factor": Refusal((0,), "the loss is cross-entropy without smoothing"),
    "shift_attn": Refusal(_OFF, "attention is whole; a longer cutoff_len needs no other"),
    "mixture_of_depths": Refusal((), "every token goes through every layer"),
    "rope_scaling": Refusal((), "set rope_scaling in the model's config.json, from which it is read"),
    "train_from_scratch": Refusal(_OFF, "give a folder with the weights to start from"),
    "disable_shuffling": Refusal(_OFF, "rows are shuffled by the seed"),
    "split_special_tokens": Refusal(_OFF, "special tokens in the data are read as such"),
    "tool_format": Refusal((), "tool calls are written as the chat template has it"),
    "freeze_language_model": Refusal(_OFF, "there is only a language model"),
    "ignore_pad_token_for_loss": Refusal((True,), "padding is never trained on"),
    "init_special_tokens": Refusal(("noise_init",), "new embeddings start as the mean of the others"),
    "new_special_tokens_config": Refusal((), "name the tokens in add_special_tokens"),
    "adapter_folder": Refusal((), "write the whole path in adapter_name_or_path"),
    "model_revision": Refusal(("main",), "download it (`hf download NAME --revision …`) and give the folder"),
    "adafactor": Refusal(_OFF, "the nearest is optim=adamw_8bit, whose state is small too"),
    "per_gpu_train_batch_size": Refusal((), "it is per_device_train_batch_size now"),
    "per_gpu_eval_batch_size": Refusal((), "it is per_device_eval_batch_size now"),
    "optim_target_modules": Refusal((), "GaLore is use_galore=true, galore_target"),
    "optim_args": Refusal(("",), "the optimiser's keys are adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
}  # fmt: skip

KNOWN = TRANSLATED | NOTED.keys() | REFUSED.keys()

# Their templates that ours are, and the system message that each adds to conversations without one.
SYSTEM_ZH = "You are a helpful assistant. 你是一个乐于助人的助手。"
TEMPLATES: Mapping[str, tuple[str, str | None]] = {
    "alpaca": ("alpaca", None),
    "chatml": ("chatml", None),
    "chatml_de": ("chatml", "Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "deepseekr1": ("deepseek_r1", None),
    "empty": ("plain", None),
    "gemma": ("gemma", None),
    "gemma2": ("gemma", None),
    "gemma3": ("gemma3", None),
    "llama2": ("llama2", None),
    "llama2_zh": ("llama2", SYSTEM_ZH),
    "llama3": ("llama3", None),
    "ministral": ("mistral_v3_tekken", None),
    "mistral": ("mistral_v3", None),
    "mistral_small": ("mistral_v7_tekken", None),
    "phi": ("phi3", None),
    "phi4": ("phi4", None),
    "qwen": ("qwen", None),
    "qwen3": ("qwen3", None),
    "qwen3_nothink": ("chatml", None),
    "smollm": ("chatml", None),
    "smollm2": ("chatml", "You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "vicuna": ("vicuna", None),
    "yi": ("chatml", None),
    "zephyr": ("zephyr", "You are Zephyr, a helpful assistant."),
}
# Where the makers of a model write something else than LLaMA-Factory, theirs is taken.
DIFFERS: Mapping[str, str] = {
    "alpaca": "begins with the token that begins a text, where the tokenizer has one",
    "deepseekr1": "there is no empty <think> block before an answer without reasoning",
    "llama2": "a space stands before the token that ends an answer",
    "llama2_zh": "a space stands before the token that ends an answer",
    "mistral": "a system message stands at the last question, so with one only the last turn can train (mask_history)",
    "vicuna": "begins with the token that begins a text, where the tokenizer has one",
    "zephyr": "a newline stands after each turn",
}
# Others of theirs, in whose place the tokenizer's own is taken.
OTHER_TEMPLATES = frozenset(
    "aeva bailing bailing_v2 breeze chatglm3 cohere cpm4 dbrx deepseek deepseek3 deepseekcoder default ernie "
    "ernie_nothink exaone falcon falcon_h1 fewshot gemma3n gemma4 gemma4n glm4 glm4_7 glm4_moe glmz1 gpt_oss "
    "granite3 granite4 hunyuan hunyuan_small hy3 index intern2 intern_s1 lfm2 llama4 mimo mimo_v2 minimax1 minimax2 "
    "ministral3 moonlight olmo openchat openchat-3.6 opencoder phi4_mini phi_small qwen3_5 qwen3_5_nothink "
    "qwen3_6 sailor seed_coder seed_oss solar starchat telechat2 xuanyuan youtu yuan".split()
)
# Those of models that see or hear.
MEDIA_TEMPLATES = frozenset(
    "dots_ocr ernie_vl glm4_5v glm4v glm_ocr granite3_vision intern_vl keye_vl kimi_vl lfm2_vl llava llava_next "
    "llava_next_llama3 llava_next_mistral llava_next_qwen llava_next_video llava_next_video_mistral "
    "llava_next_video_yi llava_next_yi mimo_vl minicpm_o minicpm_v minicpm_v_4_6 mllama paligemma paligemma_chat "
    "pixtral qwen2_audio qwen2_omni qwen2_vl qwen3_omni qwen3_omni_nothink qwen3_vl qwen3_vl_nothink video_llava "
    "yi_vl youtu_vl".split()
)
