"""Every option of vLLM's that a forward can meet is one that leaves nothing of a stopped forward to
the next, or one that steps are not stopped with. A new option fails here until it is placed."""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib import import_module

import pytest

pytest.importorskip("vllm")

from conserve.engine import capabilities, door
from conserve.engine.versions import release

pytestmark = pytest.mark.engine

LEAVES_NOTHING = {
    "vllm.config.vllm:VllmConfig": """
        model_config cache_config parallel_config scheduler_config device_config load_config
        offload_config attention_config aux_output_config mamba_config kernel_config lora_config
        watermark_config structured_outputs_config observability_config logging_config
        quant_config compilation_config profiler_config kv_transfer_config kv_events_config
        ec_manager_config reasoning_config additional_config instance_id optimization_level
        performance_mode weight_transfer_config shutdown_timeout
        watchdog_config
    """,
    "vllm.config.parallel:ParallelConfig": """
        tensor_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local
        data_parallel_master_ip data_parallel_rpc_port dp_sync_interval data_parallel_master_port
        data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb is_moe_model
        enable_hc_sp enable_expert_parallel enable_batch_sharded_sampling enable_ep_weight_filter
        eplb_config expert_placement_strategy all2all_backend max_parallel_loading_workers
        disable_custom_all_reduce enable_shm_tensor_arena elastic_ep_max_dp_size
        dbo_decode_token_threshold dbo_prefill_token_threshold disable_nccl_for_dp_synchronization
        ray_workers_use_nsight ray_runtime_env placement_group distributed_executor_backend
        worker_cls worker_extension_cls master_addr master_port node_rank numa_bind
        numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids distributed_timeout_seconds
        cpu_distributed_timeout_seconds world_size rank _data_parallel_master_port_list
        _coord_store_port decode_context_parallel_size dcp_kv_cache_interleave_size
        dcp_comm_backend dcp_q_replicate cp_kv_cache_interleave_size
        _allow_auto_resolve_cp_interleave_size data_parallel_index _api_process_count
        _api_process_rank fault_tolerance_config
    """,
    "vllm.config.offload:OffloadConfig": """
        uva prefetch
    """,
    "vllm.config.offload:UVAOffloadConfig": """
        cpu_offload_gb cpu_offload_params
    """,
    "vllm.config.offload:PrefetchOffloadConfig": """
        offload_num_in_group offload_prefetch_step offload_params
    """,
    "vllm.config.attention:AttentionConfig": """
        backend minimax_m3_msa_decode_backend backend_per_kind flash_attn_version
        flash_attn_max_num_splits_for_cuda_graph tokenspeed_mla_min_split_kv
        tq_max_kv_splits_for_cuda_graph use_trtllm_attention disable_flashinfer_q_quantization
        mla_prefill_backend use_prefill_query_quantization indexer_kv_dtype indexer_sparse_logits
        use_non_causal sparse_mla_force_mqa sparse_mla_prefill_workspace_factor flex_attn_block_m
        flex_attn_block_n flex_attn_q_block_size flex_attn_kv_block_size
        trtllm_ragged_backend indexer_tp_shard_min_rows minimax_m3_indexer_cp
    """,
    "vllm.config.kernel:KernelConfig": """
        ir_op_priority enable_flashinfer_autotune enable_rocm_segmented_attn_autotune
        enable_cutedsl_warmup enable_jit_warmup moe_backend sparse_indexer_topk_backend
        linear_backend linear_backend_per_quant
    """,
    "vllm.config.cache:CacheConfig": """
        block_size user_specified_block_size kv_cache_layout prefix_match_unit
        gpu_memory_utilization cache_dtype is_attention_free num_gpu_blocks_override
        sliding_window enable_prefix_caching prefix_caching_hash_algo
        prefix_cache_retention_interval kv_cache_dtype_skip_layers mamba_page_size_padded
        skip_page_size_padded mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype
        mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm
        use_kda_recoverssm num_gpu_blocks num_cpu_blocks effective_attention_block_size
        kv_cache_size_tokens kv_cache_max_concurrency hash_block_size cache_hit_alignment_tokens
        kv_sharing_fast_prefill swa_bounded_replay kv_cache_memory_bytes kv_offloading_size
        kv_offloading_backend _block_size_resolved
        simple_cpu_offload_num_blocks
    """,
    "vllm.config.scheduler:SchedulerConfig": """
        runner_type max_num_batched_tokens max_num_scheduled_tokens max_num_seqs
        max_num_active_seqs long_prefill_token_threshold long_prefill_token_threshold_adaptive
        max_num_queued_reqs max_num_queued_tokens enable_chunked_prefill is_multimodal_model
        max_num_encoder_input_tokens encoder_cache_size policy disable_chunked_mm_input
        scheduler_cls disable_hybrid_kv_cache_manager scheduler_reserve_full_isl watermark
        prefill_schedule_interval async_scheduling stream_interval
    """,
    "vllm.config.lora:LoRAConfig": """
        max_lora_rank max_loras fully_sharded_loras max_cpu_loras lora_dtype target_modules
        default_mm_loras enable_tower_connector_lora specialize_active_lora
        enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels
    """,
    "vllm.config.compilation:CompilationConfig": """
        mode debug_dump_path cache_dir compile_cache_save_format backend custom_ops
        ir_enable_torch_wrap splitting_ops compile_mm_encoder cudagraph_mm_encoder
        encoder_cudagraph_token_budgets encoder_cudagraph_max_vision_items_per_batch
        encoder_cudagraph_max_frames_per_batch cudagraph_decoder_replay
        decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold compile_sizes
        compile_ranges_endpoints inductor_compile_config inductor_passes cudagraph_mode
        cudagraph_num_of_warmups cudagraph_capture_sizes cudagraph_copy_inputs
        cudagraph_specialize_lora use_inductor_graph_partition pass_config
        max_cudagraph_capture_size dynamic_shapes_config local_cache_dir fast_moe_cold_start
        enabled_custom_ops disabled_custom_ops traced_files compilation_time
        encoder_compilation_time static_forward_context static_all_moe_layers
    """,
    "vllm.config.compilation:PassConfig": """
        fuse_norm_quant fuse_act_quant fuse_attn_quant eliminate_noops fuse_allreduce_rms
        enable_qk_norm_rope_fusion fuse_rope_kvcache_cat_mla fuse_act_padding
        fuse_mla_dual_rms_norm fuse_rope_kvcache fuse_qk_norm_rope_kvcache
        rope_kvcache_fusion_max_token_num fi_allreduce_fusion_max_size_mb
    """,
    "vllm.config.model:ModelConfig": """
        model model_weights runner convert tokenizer tokenizer_mode trust_remote_code dtype seed
        hf_config hf_text_config is_submodel_config word_embeddings_untied_by_checkpoint
        hf_config_path allowed_local_media_path allowed_media_domains revision code_revision
        tokenizer_revision max_model_len spec_target_max_model_len quantization
        quantization_config allow_deprecated_quantization enforce_eager return_sampling_mask
        max_logprobs logprobs_mode use_fp64_gumbel enable_trace_replay disable_sliding_window
        disable_cascade_attn skip_tokenizer_init enable_prompt_embeds served_model_name
        config_format hf_token hf_overrides model_class_overrides generation_config
        override_generation_config enable_sleep_mode sleep_preserve_parameter_names
        sleep_mode_backend sleep_mode_offload_cudagraph enable_nccl_comm_suspend
        enable_cumem_allocator model_impl logits_processors io_processor_plugin
        renderer_num_workers pooler_config multimodal_config
    """,
}
"""What a kind of model or cache leaves behind (recurrent state, rings, drafts) is told by the kind
of its cache and by the sections that only such models have, not by their options."""

REFUSED = {
    "VllmConfig": {
        "speculative_config": "were not tried",
        "diffusion_config": "canvas",
        "engram_config": "n-gram layers",
        "ec_transfer_config": "encoder output",
    },
    "ParallelConfig": {
        "pipeline_parallel_size": "pipeline stages",
        "prefill_context_parallel_size": "several ranks",
        "data_parallel_size": "other replicas",
        "nnodes": "one host only",
        "enable_dbo": "two threads",
        "ubatch_size": "two threads",
        "enable_eplb": "experts move",
        "enable_elastic_ep": "come and go",
        "enable_fault_tolerance": "ranks that fail",
    },
    "OffloadConfig": {
        "offload_backend": "weights of the next layers",
    },
    "PrefetchOffloadConfig": {
        "offload_group_size": "weights of the next layers",
    },
    "AttentionConfig": {
        "hisparse_config": "between host and device",
    },
    "KernelConfig": {
        "monokernel": "one kernel",
    },
}
"""Class -> its options, with words of the reason why steps are not stopped then."""

LATER = {
    "0.32": {
        "VllmConfig": {"watchdog_config"},
        "AttentionConfig": {
            "trtllm_ragged_backend",
            "indexer_tp_shard_min_rows",
            "minimax_m3_indexer_cp",
        },
        "KernelConfig": {"monokernel"},
        "CacheConfig": {"simple_cpu_offload_num_blocks"},
    },
}
"""Release -> class -> those of these options that came after it."""


@pytest.mark.parametrize("path", LEAVES_NOTHING)
def test_every_option_is_placed(path: str) -> None:
    module, _, name = path.partition(":")
    found = {field.name for field in fields(getattr(import_module(module), name))}
    harmless, refused = set(LEAVES_NOTHING[path].split()), set(REFUSED.get(name, ()))
    assert not harmless & refused
    assert found - harmless - refused == set(), f"{name} has options that nobody has looked at"
    later = LATER.get(release(door.VLLM_VERSION), {}).get(name, set())
    assert (harmless | refused) - found == later, f"{name} has lost options"


def test_each_refusal_has_its_reason() -> None:
    source = inspect.getsource(capabilities)
    for options in REFUSED.values():
        for option, words in options.items():
            assert words in source, option
