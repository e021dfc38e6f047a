"""Scripts: the stages, the demo, measurements. What torch says as it is imported is left out from here on, also in the
processes that nnU-Net starts, which import the script that started them."""

from fastnnunet.cli.guard import quieten_torch

quieten_torch()
