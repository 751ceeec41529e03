#!/usr/bin/env bash
# Serve a base model and every adapter of a store: examples/vllm_server/serve.sh MODEL [option of vLLM …]
set -euo pipefail
export PEFT_INTRINSIC_STORE="${PEFT_INTRINSIC_STORE:-sqlite:///adapters.db}"
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 # vLLM then asks the plugin for names that it does not know
export VLLM_PLUGINS="${VLLM_PLUGINS:-peft_intrinsic}" # and checks the store when it starts
exec vllm serve "$1" --served-model-name base-without-protection --enable-lora --max-loras 8 --max-cpu-loras 64 \
    --max-lora-rank 8 --host 127.0.0.1 --port 8000 "${@:2}"
