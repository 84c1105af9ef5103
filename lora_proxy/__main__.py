"""`python -m lora_proxy` is the `lora-proxy` command."""

import sys

from lora_proxy.cli import main

sys.exit(main())
