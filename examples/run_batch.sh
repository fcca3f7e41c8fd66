#!/usr/bin/env bash
# Offline batches in OpenAI's file format: examples/run_batch.sh [MODEL] [OUTPUT.jsonl] [options of vllm run-batch]
# Without a model, or with "", the demo model of this package. --enforce-eager starts sooner.
# On a CPU, VLLM_CPU_KVCACHE_SPACE=1 in the environment keeps vLLM from asking for 92 % of the memory.
set -euo pipefail
positional=()
while [[ $# -gt 0 && "$1" != -* ]]; do
  positional+=("$1")
  shift
done
model="${positional[0]:-$(lfm2 demo --path)}"
output="${positional[1]:-batch_output.jsonl}"
requests="$(mktemp --suffix .jsonl)"
trap 'rm -f "$requests"' EXIT

for words in "apple river star" "star moon fox" "queen snow garden"; do
  cat >> "$requests" <<JSON
{"custom_id": "${words// /-}", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "$model", "messages": [{"role": "user", "content": "Repeat: $words"}], "temperature": 0, "max_tokens": 32}}
JSON
done

vllm run-batch -i "$requests" -o "$output" --model "$model" --max-model-len 2048 --max-num-seqs 8 "$@"
python - "$output" <<'PYTHON'
import json, sys
for line in open(sys.argv[1]):
    reply = json.loads(line)
    print(reply["custom_id"], "->", reply["response"]["body"]["choices"][0]["message"]["content"])
PYTHON
