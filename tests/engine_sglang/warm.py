"""What the fork server imports before the first job: SGLang, and our model's modules."""

import sglang.srt.entrypoints.engine
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.version

VERSION = sglang.version.__version__
