"""Bad inputs for the scripts: each row is a call, the one line on stderr that it gets, and its exit status.

`python tests/bad_inputs.py` runs all of them, some as processes of their own, and prints how many passed;
`test_bad_inputs.py` runs those that need no process. Nothing may be half-written, and there is no traceback.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scripts
from preprocessing.phantom import generate_phantom
from running.checkpoints import CHECKPOINT_FORMAT
from scripts import Result, call, shell, succeed
from test_dicom_kinds import jpeg, jpeg_2000, stream_file, under_syntax
from test_images import OTHER_CLASSES, dicom_file, other_object
from test_padding import padded_file
from trees import own_case_files, write_case_files, write_dicom, write_kaggle, write_tcia

# Status, script, flags, and a regular expression for the line on stderr. After a script, + means that it may have written
# files, whole ones only, and $ that it runs as a process of its own. Flags after BARE replace the usual ones. `full` and
# `limit`, before a colon, mean a full disk and a limit on the size of files.
ROWS = r"""
2 | main-vqvae | --task nowhere | argument --task: invalid choice: 'nowhere'
2 | main-vqvae | --tasks phantom | unrecognized arguments: --tasks
2 | main-vqvae | --batch-size 0 | argument --batch-size: must be a whole number
2 | main-vqvae | --batch-size two | argument --batch-size: must be a whole number
2 | main-vqvae | --epochs 0 | argument --epochs: must be a whole number of at least 1
2 | main-vqvae | --epochs -1 | argument --epochs: must be a whole number
2 | main-vqvae | --seed -1 | argument --seed: must be a whole number
2 | main-vqvae | --seed 99999999999999999999999 | --seed
2 | main-vqvae | --num-workers x | argument --num-workers: must be a whole number
2 | main-vqvae | --amp --no-amp | not allowed with argument --amp
2 | main-vqvae | --evaluate | --evaluate needs --load-path
2 | main-vqvae | --task folder | --task folder needs --data-root
2 | main-vqvae | --task folder --data-root {missing} | --data-root {missing}: no such folder
2 | main-vqvae | --task cbis-ddsm --data-root {missing} | {missing}
2 | main-vqvae | --task cbis-ddsm --data-root {empty} | {empty}
2 | main-vqvae | --task folder --data-root {void} | --data-root {void}: no such folder
2 | main-vqvae | --task folder --data-root {empty} | {empty}: no images in it
2 | main-vqvae | --task folder --data-root {two} {each} | 2 patients are too few
2 | main-vqvae | --task folder --data-root {text} {each} | .png: not a readable image
2 | main-vqvae | --task folder --data-root {text} {each} --num-workers 0 | .png: not a readable image
2 | main-vqvae | --task folder --data-root {cut} {each} | .png: not a readable image
2 | main-vqvae | --task folder --data-root {colour} {each} | .png: a colour image
2 | main-vqvae | --task folder --data-root {dot} {each} | .png
2 | main-vqvae | --task folder --data-root {unpaired} | c.png: has no low-dose image
2 | main-vqvae | --task folder --data-root {sizes} {each} | .png: 50 x 50 pixels, but its full-dose pair has 96 x 128
2 | main-vqvae | --task folder --data-root {no-column} | {no-column}/split.csv: has no column 'split'
2 | main-vqvae | --task folder --data-root {no-split} | {no-split}/split.csv: split 'training' is none of
2 | main-vqvae | --task folder --data-root {two-splits} | {two-splits}/split.csv: patient 1 stands in
2 | main-vqvae | --task folder --data-root {images} --hps split_csv={missing} | split_csv={missing}: no such file
2 | main-vqvae | --task folder --data-root {images} --hps split_csv={garbage} | {garbage}: not a readable CSV
2 | main-vqvae | --task folder --data-root {images} --hps patient_pattern=(x) | patient_pattern=\(x\): its first group
2 | main-vqvae | --task folder --data-root {images} --hps patient_pattern=(x | patient_pattern=\(x
2 | main-vqvae | --task folder --data-root {images} | {images}: its patients cannot be told \(6 images, .* of 6 patients\); add
2 | main-vqvae | --task folder --data-root {numbered} | {numbered}: its patients cannot be told \(files called '1' lie in several
2 | main-vqvae | --task folder --data-root {nobody} | {nobody}: its patients cannot be told \(4 images, .* of 4 patients\); add
0 | main-vqvae+ | --task folder --data-root {beside} --epochs 1 --num-workers 0 | ^$
2 | main-vqvae | --task folder --data-root {others} | {others}: no images in it; looked for .* and DICOM files of other names
2 | main-vqvae | --load-path {missing} | {missing}: no such checkpoint
2 | main-vqvae | --load-path {empty} | {empty}: holds no checkpoint
2 | main-vqvae | --load-path {garbage} | {garbage}: not a readable checkpoint
2 | main-vqvae | --load-path {void} | {void}: not a readable checkpoint
2 | main-vqvae | --load-path {code} | {code}: not a readable checkpoint
2 | main-vqvae | --load-path {foreign} | {foreign}: not a checkpoint of this project
2 | main-vqvae | --load-path {future} | {future}: checkpoint format 2, but this version reads 1
2 | main-vqvae | --load-path {partial} | {partial}: parts of the checkpoint are missing
2 | main-vqvae | --load-path {diffusion} | {diffusion}: a checkpoint of main-diffusion.py \(stage 2\)
2 | main-vqvae | --load-path {vqvae} --task folder | {vqvae} was trained on phantom
2 | main-vqvae | --load-path {vqvae} --hps hidden_channels=32 | hidden_channels=32: the checkpoint was trained with 16
2 | main-vqvae | --out {latents}/../vqvae | holds a run already
2 | main-vqvae | --out {garbage} | --out {garbage}: cannot be made
2 | main-vqvae | --hps learning_rat=1 | learning_rat: no such hyperparameter; did you mean learning_rate\?
2 | main-vqvae | --hps learning_rate | --hps learning_rate: write it as key=value
2 | main-vqvae | --hps learning_rate=fast | --hps learning_rate=fast: the value must be of type float
2 | main-vqvae | --hps learning_rate=-1 | --hps learning_rate=-1.0: must be greater than 0
2 | main-vqvae | --hps learning_rate=nan | --hps learning_rate=nan: must be greater than 0
2 | main-vqvae | --hps noise_level=inf | --hps noise_level=inf
2 | main-vqvae | --hps nb_levels=2.5 | --hps nb_levels=2.5: the value must be of type int
2 | main-vqvae | --hps amp=maybe | --hps amp=maybe: the value must be of type bool
2 | main-vqvae | --hps image_shape=1,64 | --hps image_shape=\[1, 64\]: must be channels, height, width
2 | main-vqvae | --hps image_shape=big | --hps image_shape=big: the value must be a list
2 | main-vqvae | --hps image_shape=3,64,48 | --hps in_channels=1: image_shape has 3 channels
2 | main-vqvae | --hps image_shape=3,64,48 --hps in_channels=3 | image_shape
2 | main-vqvae | --hps image_shape=1,16,16 --hps crop_size=0 | image_shape
2 | main-vqvae | --hps crop_size=64 | --hps crop_size=64: larger than image_shape
2 | main-vqvae | --hps scaling_rates=4,2,2 | --hps scaling_rates=\[4, 2, 2\]: must hold nb_levels=2 rates
2 | main-vqvae | --hps embed_dim=32 | embed_dim
2 | main-vqvae | --hps recon_loss=huber | --hps recon_loss=huber: must be one of mse, l1
2 | main-vqvae | --hps mini_batch_size=3 | --hps mini_batch_size=3: must divide batch_size 4
2 | main-vqvae | --hps model_channels=64 | --hps model_channels: no such hyperparameter
2 | main-latents |  | the following arguments are required: checkpoint
2 | main-latents | {diffusion} | {diffusion}: a checkpoint of main-diffusion.py \(stage 2\)
2 | main-latents | {vqvae} --out {latents} | --out {latents}: exists already
2 | main-latents | {vqvae} --out {garbage}/x | --out {garbage}/x: cannot be written
2 | main-latents | {vqvae} --realisations 0 | argument --realisations: must be a whole number
2 | main-latents | {vqvae} --task folder | --task folder needs --data-root
2 | main-latents | {vqvae} --task folder --data-root {no-test} --out x | {no-test}: no images for test
2 | main-diffusion |  | the following arguments are required: --vqvae-path
2 | main-diffusion | --vqvae-path {missing} | {missing}: no such checkpoint
2 | main-diffusion | --vqvae-path {diffusion} | {diffusion}: a checkpoint of main-diffusion.py \(stage 2\)
2 | main-diffusion | --vqvae-path {vqvae} --evaluate | --evaluate needs --load-path
2 | main-diffusion | --vqvae-path {vqvae} --load-path {vqvae} | {vqvae}: a checkpoint of main-vqvae.py \(stage 1\)
2 | main-diffusion | --vqvae-path {wide} | --vqvae-path {wide}: its latents have 32 channels
2 | main-diffusion | --vqvae-path {other} --load-path {diffusion} | {diffusion} was trained on another VQ-VAE-2
2 | main-diffusion | --vqvae-path {other} --load-path {diffusion} --evaluate | {diffusion} was trained on another VQ-VAE-2
2 | main-diffusion | --vqvae-path {vqvae} --load-path {diffusion} --hps model_channels=64 | was trained with 32
2 | main-diffusion | --vqvae-path {other} --latents {latents} | {latents}: extracted with {vqvae}, not with {other}
2 | main-diffusion | --vqvae-path {vqvae} --latents {missing} | --latents {missing}: no index.json
2 | main-diffusion | --vqvae-path {vqvae} --latents {codes} | --latents {codes}: holds code indices only
2 | main-diffusion | --vqvae-path {vqvae} --latents {text-index} | {text-index}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {list-index} | {list-index}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {binary-index} | {binary-index}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {no-splits} | {no-splits}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {no-digest} | {no-digest}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {hollow-index} | {hollow-index}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {new-index} | {new-index}/index.json: format 9, this version reads 1
2 | main-diffusion | --vqvae-path {vqvae} --latents {cut-array} | {cut-array}/train/clean.npy: not readable
2 | main-diffusion | --vqvae-path {vqvae} --latents {text-array} | {text-array}/train/degraded.npy: not readable
2 | main-diffusion | --vqvae-path {vqvae} --latents {pickled-array} | {pickled-array}/train/clean.npy: not readable
2 | main-diffusion | --vqvae-path {vqvae} --latents {short-array} | {short-array}/validation/clean.npy: shape \(1, 16,
2 | main-diffusion | --vqvae-path {vqvae} --latents {latents} --hps crop_size=20 | crop_size=20: must be a multiple of 8
2 | main-diffusion | --vqvae-path {vqvae} --latents {latents} --hps noise_level=0.4 | extracted with noise_level=0.2
2 | main-diffusion | --vqvae-path {vqvae} --latents {latents} --evaluate --load-path {diffusion} | --latents goes with training
2 | main-diffusion | --vqvae-path {vqvae} --hps num_head_channels=48 | num_head_channels
2 | main-diffusion | --vqvae-path {vqvae} --hps model_channels=40 | --hps model_channels=40: must be a multiple of 32
2 | main-diffusion | --vqvae-path {vqvae} --hps in_channels=16 | --hps in_channels=16: must be twice out_channels=16
2 | main-diffusion | --vqvae-path {vqvae} --hps attention_levels=2 | --hps attention_levels=\[2\]: the levels of channel_mult are
2 | main-diffusion | --vqvae-path {vqvae} --hps ddim_steps=1001 | --hps ddim_steps=1001: more than timesteps=1000
2 | main-diffusion | --vqvae-path {vqvae} --hps fast_steps=1001 | --hps fast_steps=1001: more than timesteps=1000
2 | main-diffusion | --vqvae-path {vqvae} --hps noise_level=0 | --hps noise_level=0.0: leaves nothing unknown to sample
2 | main-diffusion | --vqvae-path {vqvae} --hps mean_channels=40 | --hps mean_channels=40: must be a multiple of 32
2 | main-diffusion | --vqvae-path {vqvae} --hps precondition=wiener | --hps precondition=wiener: must be one of residual, none
2 | main-diffusion | --vqvae-path {vqvae} --hps linear_end=1.5 | linear_end
2 | main-diffusion+ | --vqvae-path {vqvae} --hps learning_rate=1e30 --batch-size 8 --epochs 3 | is not finite
2 | main-vqvae | --hps batch_size=99999999999999999999 | --hps batch_size=99999999999999999999: must be below
2 | main-vqvae | --hps batch_size=8 | --batch-size and --hps batch_size=8 differ; leave one of them out
2 | main-diffusion | --vqvae-path {vqvae} --epochs 2 --hps max_epochs=3 | --epochs and --hps max_epochs=3 differ
2 | main-vqvae | --hps =3 | --hps =3: write it as key=value
2 | main-vqvae | --task phantom --data-root {one-bad} | task phantom makes its own images
2 | main-vqvae | --hps hidden_channels=1000000 | not enough memory
2 | main-export | --vqvae-path {vqvae} --load-path {vqvae} --out= | argument --out: must not be empty
2 | main-vqvae | --cuda | not allowed with argument --cpu
2 | main-vqvae$ | BARE --task phantom --cuda --no-tqdm | --cuda: no CUDA device found
2 | main-restore$ | BARE {scan} --out x --cuda --no-tqdm | --cuda: no CUDA device found
2 | main-vqvae$ | --load-path {code} | {code}: not a readable checkpoint
2 | main-vqvae$ | --task folder --data-root {text} {each} --num-workers 1 | \.png: not a readable image
2 | main-vqvae$ | --task folder --data-root {text} {each} --num-workers 1 --no-cache | \.png: not a readable image
2 | main-vqvae | --load-path {packed} | {packed}: not a readable checkpoint
2 | main-vqvae | --load-path {flipped} | {flipped}: not a readable checkpoint
2 | main-vqvae | --load-path {no-task} | {no-task}: parts of the checkpoint are damaged \(task 'nowhere'\)
2 | main-vqvae | --load-path {text-setting} | {text-setting}: parts of the checkpoint are damaged \(setting hidden_channels\)
2 | main-vqvae | --load-path {text-epoch} | {text-epoch}: parts of the checkpoint are damaged \(epoch\)
2 | main-vqvae | --load-path {odd-model} | {odd-model}: parts of the checkpoint are damaged \(model\)
2 | main-vqvae | --load-path {odd-patients} | {odd-patients}: parts of the checkpoint are damaged \(patients\)
2 | main-vqvae | --load-path {list-kind} | {list-kind}: a checkpoint of \['vqvae'\], but one of main-vqvae.py
2 | main-vqvae | --load-path {weights-alone} | {weights-alone}: holds weights alone, as main-export.py writes them
2 | main-vqvae | --load-path {no-optimizer} | {no-optimizer}: its training state does not fit
2 | main-vqvae | --load-path {text-rng} | {text-rng}: its training state does not fit
2 | main-vqvae | --load-path {device-split} --task folder --data-root {images} --evaluate | split_csv=/dev/zero: no such file
2 | main-latents | {huge} | {huge}: parts of the checkpoint are damaged \(setting hidden_channels=1000000000
2 | main-latents | {odd} | {odd}: no model can be built of its settings \(--hps embed_dim=32: must not exceed
2 | main-latents | {nan} | {nan}: the weights are damaged
2 | main-vqvae | --task folder --data-root {climbing} | split.csv: the path '\.\./a\.png' leads out of the data root
2 | main-vqvae | --task folder --data-root {absolute} | split.csv: the path '/etc/passwd' leads out of the data root
2 | main-vqvae | --task cbis-ddsm --data-root {cbis-climbing} | _set.csv: the path '\.\./.*' leads out of the data root
2 | main-vqvae | --task cbis-ddsm --data-root {cbis-absolute} | _set.csv: the path '/.*' leads out of the data root
2 | main-vqvae | --task cbis-ddsm --data-root {cbis-column} | _set.csv: has no column 'pathology'
2 | main-vqvae | --task cbis-ddsm --data-root {cbis-binary} | _set.csv: not a readable CSV file
2 | main-vqvae | --task cbis-ddsm --data-root {cbis-semicolons} | {cbis-semicolons}: neither DICOM files of the cases
2 | main-vqvae | --task cbis-ddsm --data-root {cbis-crops} | {cbis-crops}: neither DICOM files of the cases
2 | main-vqvae | --task cbis-ddsm --data-root {cbis-bare} | neither DICOM files of the cases
2 | main-vqvae | --task cbis-ddsm --data-root {kaggle-climbing} | dicom_info.csv: the path '.*\.\./.*' leads out of the data root
2 | main-vqvae | --task cbis-ddsm --strict --data-root {cbis-gap} | mammograms? missing, such as
2 | main-vqvae | --task folder --data-root {one-bad} --strict | z\.png: not a readable image
2 | main-vqvae+ | --task folder --data-root {one-bad} --strict --no-cache | z\.png: not a readable image
2 | main-latents | {vqvae} --task folder --data-root {one-bad} --strict | z\.png: not a readable image
0 | main-vqvae+ | --task folder --data-root {one-bad} --epochs 1 --num-workers 0 | ^warning: .*z\.png: not a
0 | main-vqvae+ | --task folder --data-root {one-bad} --epochs 1 --num-workers 1 --no-cache | ^warning: .*z\.png: not a
1 | main-latents+ | {vqvae} --task folder --data-root {one-bad} --num-workers 0 --out latents | ^error: .*z\.png: not a
1 | main-vqvae+ | --load-path {vqvae} --task folder --data-root {bad-test} --evaluate --out e | ^error: .*z\.png: not a
1 | main-restore+ | {models} {one-bad} --out x | error: .*z\.png: not a readable image
0 | main-restore+ | {models} {beside} --out x | ^$
2 | main-restore | {models} {others} --out x | {others}: no images in it; looked for .* and DICOM files of other names
2 | main-restore | {models} {report} --out x | {report}: a DICOM file of class Mammography CAD SR Storage, which holds no image
2 | main-restore | {models} {bomb-png} --out x | {bomb-png}: declares .* pixels
2 | main-restore | {models} {wide-png} --out x | {wide-png}: declares 150,000 x 1,000 pixels, more than 134,217,728
2 | main-restore | {models} {bomb-tiff} --out x | {bomb-tiff}: declares .* pixels
2 | main-restore | {models} {bomb-pgm} --out x | {bomb-pgm}: declares .* pixels
2 | main-restore | {models} {bomb-dicom} --out x | {bomb-dicom}: declares 60,000 x 60,000 pixels
2 | main-restore | {models} {bomb-rle} --out x | {bomb-rle}: declares 60,000 x 60,000 pixels
2 | main-restore | {models} {bomb-j2k} --out x | {bomb-j2k}: declares 60,000 x 60,000 pixels
2 | main-restore | {models} {bomb-jpeg} --out x | {bomb-jpeg}: declares 60,000 x 60,000 pixels
2 | main-restore | {models} {bomb-jls} --out x | {bomb-jls}: declares 60,000 x 60,000 pixels
2 | main-restore | {models} {bomb-deflated} --out x | {bomb-deflated}: inflates to more than
2 | main-restore | {models} {frames-dicom} --out x | {frames-dicom}: a multi-frame or colour DICOM
2 | main-restore | {models} {frames-tiff} --out x | {frames-tiff}: holds several pages
2 | main-restore | {models} {frames-png} --out x | {frames-png}: holds several pages
2 | main-restore | {models} {script-png} --out x | {script-png}: not a readable image \(of no known format\)
2 | main-restore | {models} {big-endian} --out x | {big-endian}: big-endian DICOM can be read but not written; convert it
2 | main-restore | {models} {no-preamble} --out x | not a readable image \(DICOM without its preamble\); mend it with dcmconv \+te
2 | main-restore | {models} {jpeg-in-16} --out x | in 8 bits, but its header has BitsAllocated 16; convert it with dcmdjpeg
2 | main-restore | {models} {two-signs} --out x | {two-signs}: its stream has unsigned values that do not fit its header
2 | main-restore | {models} {not-compressed} --out x | {not-compressed}: its transfer syntax says .* are not compressed
2 | main-restore | {models} {picture-dcm} --out x | {picture-dcm}: not a readable image \(PNG under the name of DICOM\)
2 | main-restore | {models} {dicom-png} --out x | {dicom-png}: not a readable image \(DICOM under the name of a picture\)
2 | main-restore | {models} {jpeg-12} --out x | {jpeg-12}: not a readable image \(JPEG of 12 bits, .*\); convert it to 8- or 16-bit
2 | main-restore | {models} {jpeg-xl} --out x | {jpeg-xl}: not a readable image \(JPEG XL, .*\); convert it to 8- or 16-bit
2 | main-restore | {models} {cmyk} --out x | {cmyk}: pixel format CMYK is not 8- or 16-bit grayscale; convert it
2 | main-restore | {models} {long-name} --out x --samples 2 | {long-name}: too long a name for .*; shorten it
1 | main-restore+ | {models} {scan} {big-endian} --out x | ^error: {big-endian}: big-endian DICOM can be read but not written
0 | main-restore+ | {models} {left-over} --out x | ^warning: 1 image, {left-over}: the padding declared does not fit into
0 | main-restore+ | {models} {past-the-bits} --out x | ^warning: 64 pixels of 1 image, .*: more bits than BitsStored
2 | main-restore | {models} {missing} --out x | {missing}: no such file or folder
2 | main-restore | {models} {empty} --out x | {empty}: no images in it
2 | main-restore | {models} {scan} | the following arguments are required: --out
2 | main-restore | {models} {scan} --out {images} | --out: .*p0.png is an input and is not overwritten
2 | main-restore | {models} {scan} --out {garbage} | {garbage}.*(cannot be|is no)
2 | main-restore | {models} {scan} --out /proc/x | --out /proc/x: cannot be made
2 | main-restore | {models} {scan} --out x --noise-level loud | argument --noise-level: must be auto, trained
2 | main-restore | {models} {scan} --out x --degrade -1 | argument --degrade: must be 0 or a number
2 | main-restore | {models} {scan} --out x --tile 0 | argument --tile: must be a whole number
2 | main-restore | {models} {scan} --out x --samples 1 | argument --samples: must be at least 2, for their spread; --sample
2 | main-restore | {models} {scan} --out x --samples 2 --sample | argument --sample: not allowed with argument --samples
2 | main-restore | {models} {scan} --out x --sample --sampler euler | argument --sampler: invalid choice: 'euler'
2 | main-restore | {models} {scan} --out x --sampler ddim | --sampler goes with --sample or --samples
2 | main-restore | {models} {scan} --out x --steps 2 | --steps goes with --sample or --samples
2 | main-restore | {models} {scan} --out x --sample --steps 1001 | --steps 1001: the model has 1000 timesteps
2 | main-restore | {models} {scan} --out x --samples 2 --steps 400 | --steps 400: DPM-Solver\+\+ has no 400 different timesteps
2 | main-restore | --vqvae-path {vqvae} --load-path {mean-only} {scan} --out x --sample | {mean-only}: its training ended before the
2 | main-restore | {models} {scan} --out {taken} --samples 2 | --out: .*p0\.sample-02\.png is no restored image and is not
2 | main-restore | {models} {scan} --out x --samples 2 --calibration {garbage} | {garbage}: not a calibration
2 | main-restore | {models} {scan} --out x --calibration {garbage} | --calibration goes with --samples
2 | main-restore | --load-path {diffusion} {scan} --out x | --load-path needs --vqvae-path
2 | main-restore | --vqvae-path {other} --load-path {diffusion} {scan} --out x | was trained on another VQ-VAE-2
2 | main-restore | --vqvae-path {vqvae} --load-path {code} {scan} --out x | {code}: not a readable checkpoint
2 | main-restore | --vqvae-path {vqvae} --load-path {old} {scan} --out x | {old}: checkpoint format 1, but this version reads 2
2 | main-diffusion | --vqvae-path {vqvae} --load-path {old} | {old}: checkpoint format 1, but this version reads 2; train it anew
2 | main-export | --vqvae-path {vqvae} --load-path {old} --out x | {old}: checkpoint format 1, but this version reads 2
2 | main-export | --load-path {diffusion} --out x | the following arguments are required: --vqvae-path
2 | main-export | --vqvae-path {other} --load-path {diffusion} --out x | was trained on another VQ-VAE-2
2 | main-export | --vqvae-path {vqvae} --load-path {diffusion} --out x --hps timesteps=5 | --hps timesteps: the weights were trained
2 | main-export | --vqvae-path {vqvae} --load-path {diffusion} --out x --hps mean_epochs=5 | --hps mean_epochs: the weights were
2 | main-export | --vqvae-path {vqvae} --load-path {diffusion} --out {garbage} | {garbage}/vqvae.pt: cannot be written
2 | main-export | --vqvae-path {vqvae} --load-path {diffusion} --out /proc/x | /proc/x/vqvae.pt: cannot be written
2 | main-diffusion | --vqvae-path {vqvae} --latents {wrong-dtype} | {wrong-dtype}/train/clean.npy: .* bytes of int32
2 | main-diffusion | --vqvae-path {vqvae} --latents {long-array} | {long-array}/train/clean.npy: .* bytes of float32
2 | main-diffusion | --vqvae-path {vqvae} --latents {zip-array} | {zip-array}/train/clean.npy: not readable
2 | main-diffusion | --vqvae-path {vqvae} --latents {climbing-index} | {climbing-index}/index.json: the path '\.\./train/0000'
2 | main-diffusion | --vqvae-path {vqvae} --latents {text-draws} | {text-draws}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {deep-index} | {deep-index}/index.json: damaged
2 | main-diffusion | --vqvae-path {vqvae} --latents {flat-index} | {flat-index}/index.json: damaged
2 | main-vqvae | --out /proc/x | --out /proc/x: cannot be made
2 | main-vqvae | --out {garbage}/x | --out {garbage}/x: cannot be made
2 | main-vqvae | --task folder --data-root {images} {each} --cache {garbage} | --cache {garbage}: cannot be written
2 | main-vqvae | --task folder --data-root {images} {each} --cache /proc/x | --cache /proc/x: cannot be written
2 | main-vqvae | --load-path {busy} --epochs 2 | --out {busy}: another process is writing there
2 | main-vqvae+ | --load-path {odd-log} --epochs 2 | {odd-log}/log.csv: not a readable log
2 | main-vqvae | --hps image_shape={deep} | the value must be a list
2 | main-restore | {models} {scan} --out x --samples 2 --calibration {deep-file} | {deep-file}: not a calibration
2 | main-vqvae | --out {busy-new} | --out {busy-new}: another process is writing there
2 | main-latents | {vqvae} --out {busy-new}/latents | another process is writing there
2 | main-vqvae$+ | limit: --epochs 1 --out run | cannot be written \(File too large\)
2 | main-latents+ | limit: {vqvae} --out run | --out run: cannot be written \(File too large\)
2 | main-vqvae$+ | full: --epochs 1 --out {disk}/run | cannot be written \(No space left on device\)
2 | main-latents$+ | full: {vqvae} --out {disk}/latents --float32 | are needed and .* are free
2 | main-restore$+ | full: {models} {scan} --compare --out {disk}/restored | cannot be written \(No space left on device\)
2 | main-vqvae$+ | full: --task folder --data-root {images} {each} --cache {disk}/cache | are needed and .* are free
"""


@dataclass(frozen=True)
class Row:
    """One bad input."""

    status: int
    script: str
    line: str
    pattern: str
    writes: bool  # may have begun to
    shell: bool
    environment: str

    @property
    def quick(self) -> bool:
        """Whether it needs no process and no disk of its own."""
        return not self.shell and self.environment != "full"


def rows() -> list[Row]:
    """The table."""
    parsed = []
    for text in ROWS.strip().split("\n"):
        status, script, line, pattern = text.split(" | ")
        environment, line = line.split(": ") if re.match("(full|limit): ", line) else ("", line)
        parsed.append(Row(int(status), script.rstrip("+$"), line, pattern, "+" in script, "$" in script, environment))
    return parsed


# --- the files that the rows name -------------------------------------------------------------------------------------


class Code:
    """Loading its pickle makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


EACH = "--hps patient_pattern=file"  # each file is its own patient


def array_bytes(array: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def pickled_array() -> bytes:
    return array_bytes(np.array([{"a": 1}], dtype=object), allow_pickle=True)


def bomb_png(path: Path, width: int, height: int, animated: bool = False) -> Path:
    """A PNG whose header declares more pixels than it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    frames = chunk(b"acTL", struct.pack(">II", 100_000, 0)) if animated else b""
    data = chunk(b"IDAT", zlib.compress(bytes(4096)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + frames + data + chunk(b"IEND", b""))
    return path


def bomb_dicom(path: Path, stream: bytes, syntax: str, side: int = 8) -> Path:
    """A compressed DICOM whose header declares `side` pixels a side; the stream may declare another size."""
    dicom_file(path, np.zeros((8, 8), np.uint16))
    header = pydicom.dcmread(path)
    header.Rows = header.Columns = side
    header.PixelData, header.file_meta.TransferSyntaxUID = encapsulate([stream]), syntax
    header["PixelData"].is_undefined_length = True
    header.save_as(path, enforce_file_format=True)
    return path


def jpeg_header(marker: int, width: int, height: int, bits: int = 16) -> bytes:
    """The beginning of a JPEG or JPEG-LS stream: a comment, then the start of frame `marker`."""
    frame = struct.pack(">HBHHB3B", 11, bits, height, width, 1, 1, 0x11, 0)
    return b"\xff\xd8\xff\xfe\x00\x04ab\xff" + bytes([marker]) + frame + b"\xff\xd9"


def write_bombs(folder: Path) -> dict[str, Path]:
    """Images that declare more than they hold, or more than fits in memory."""
    folder.mkdir()
    big, paths = 60_000, {}
    paths["bomb-png"] = bomb_png(folder / "bomb.png", big, big)
    paths["wide-png"] = bomb_png(folder / "wide.png", 150_000, 1_000)
    paths["frames-png"] = bomb_png(folder / "frames.png", 64, 64, animated=True)
    paths["bomb-tiff"] = folder / "bomb.tif"
    entries = [(256, big), (257, big), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, big), (279, 100)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    paths["bomb-tiff"].write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(104))
    paths["bomb-pgm"] = folder / "bomb.pgm"
    paths["bomb-pgm"].write_bytes(b"P5 60000 60000 255\n" + bytes(100))
    paths["frames-tiff"] = folder / "frames.tif"
    page = Image.new("L", (64, 64), 100)
    page.save(paths["frames-tiff"], save_all=True, append_images=[page] * 99)
    paths["script-png"] = folder / "script.png"
    paths["script-png"].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    paths["bomb-dicom"] = dicom_file(folder / "bomb.dcm", np.zeros((8, 8), np.uint16))
    header = pydicom.dcmread(paths["bomb-dicom"])
    header.Rows = header.Columns = big
    header.save_as(paths["bomb-dicom"], enforce_file_format=True)
    paths["frames-dicom"] = dicom_file(folder / "frames.dcm", np.zeros((8, 8), np.uint16), NumberOfFrames=10**6)
    paths["bomb-rle"] = bomb_dicom(folder / "rle.dcm", struct.pack("<16I", 2, 64, 66, *[0] * 13), RLELossless, big)
    siz = struct.pack(">HHHIIIIIIIIH", 0xFF51, 41, 0, big, big, 0, 0, big, big, 0, 0, 1) + b"\x0f\1\1"
    paths["bomb-j2k"] = bomb_dicom(folder / "j2k.dcm", b"\xff\x4f" + siz + b"\xff\xd9", JPEG2000Lossless)
    paths["bomb-jpeg"] = bomb_dicom(folder / "jpeg.dcm", jpeg_header(0xC3, big, big), JPEGLosslessSV1)
    paths["bomb-jls"] = bomb_dicom(folder / "jls.dcm", jpeg_header(0xF7, big, big), JPEGLSLossless)
    paths["bomb-deflated"] = dicom_file(folder / "deflated.dcm", np.zeros((8, 8), np.uint16))
    header = pydicom.dcmread(paths["bomb-deflated"])
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(paths["bomb-deflated"], enforce_file_format=True)
    content = paths["bomb-deflated"].read_bytes()
    length = pydicom.dcmread(paths["bomb-deflated"]).file_meta.FileMetaInformationGroupLength
    meta = content[: 144 + length]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = b"".join(deflate.compress(bytes(2**20)) for _ in range(300)) + deflate.flush()
    paths["bomb-deflated"].write_bytes(meta + zeros)
    return paths


def write_dicoms(folder: Path, scan: Path) -> dict[str, Path]:
    """Folders of DICOM files: of nobody, without images, and of four patients with what lies beside images."""
    paths = {name: folder / name for name in ("nobody", "others", "beside")}
    for path in paths.values():
        path.mkdir(parents=True)
    with Image.open(scan) as image:
        values = np.asarray(image).astype(np.uint16) * 16
    for i in range(4):
        dicom_file(paths["nobody"] / f"{i}.dcm", values, PatientID="removed", StudyInstanceUID=f"1.2.{i}")
    for i, name in enumerate(("a.dcm", "b.ima", "c.dic", "d", "e.DCM", "f.dicom")):
        dicom_file(paths["beside"] / name, values, PatientID=f"p{i // 2}")
    for root in (paths["others"], paths["beside"]):
        for name, kind in OTHER_CLASSES.items():
            other_object(root / name, kind)
    return paths | {"report": paths["others"] / "cad.dcm"}


def write_oddities(folder: Path) -> dict[str, Path]:
    """Images with what real archives have: in another format than their names say, or whose headers and pixels differ."""
    folder.mkdir()
    values = np.linspace(0, 4095, 48 * 40).reshape(48, 40).round().astype(np.uint16)
    small, paths = (values >> 4).astype(np.uint8), {}
    paths["big-endian"] = dicom_file(folder / "big-endian.dcm", values, syntax=ExplicitVRBigEndian)
    paths["no-preamble"] = folder / "no-preamble.dcm"
    paths["no-preamble"].write_bytes(dicom_file(folder / "plain.dcm", values).read_bytes()[132:])
    paths["jpeg-in-16"] = stream_file(folder / "jpeg.dcm", jpeg(small), JPEGBaseline8Bit, small.astype(np.uint16))
    paths["two-signs"] = stream_file(
        folder / "signs.dcm", jpeg_2000(values), JPEG2000Lossless, values, PixelRepresentation=1
    )
    paths["not-compressed"] = under_syntax(folder / "syntax.dcm", ExplicitVRLittleEndian, JPEG2000Lossless)
    paths["picture-dcm"], paths["dicom-png"] = folder / "picture.dcm", folder / "dicom.png"
    Image.fromarray(small).save(paths["picture-dcm"], "PNG")
    paths["dicom-png"].write_bytes(dicom_file(folder / "plain.dcm", values).read_bytes())
    paths["jpeg-12"], paths["jpeg-xl"], paths["cmyk"] = (folder / f"{name}.jpg" for name in ("12", "xl", "cmyk"))
    paths["jpeg-12"].write_bytes(jpeg_header(0xC1, 40, 48, bits=12))
    paths["jpeg-xl"].write_bytes(b"\xff\x0a" + bytes(64))
    Image.new("CMYK", (40, 48)).save(paths["cmyk"])
    paths["long-name"] = folder / ("x" * 250 + ".png")
    Image.fromarray(small).save(paths["long-name"])
    paths["left-over"] = padded_file(folder / "left.dcm", small, 0, 658, bits=8, allocated=8)
    values[8:16, 8:16] = 5000
    paths["past-the-bits"] = dicom_file(folder / "past.dcm", values)
    return paths


def write_trees(folder: Path) -> dict[str, Path]:
    """CBIS-DDSM trees with something wrong in each."""

    def tree(name: str, change: Callable[[str], str] = str, images: bool = False) -> Path:
        root = folder / name
        files = own_case_files()
        write_case_files(root, files)
        table = next(path for path in sorted(root.rglob("mass_case_description_train_set.csv")))
        table.write_text(change(table.read_text()))
        if images:
            write_tcia(root / "CBIS-DDSM", files, uid_folders=True)
        return root

    paths = {
        "cbis-climbing": tree("cbis-climbing", lambda text: text.replace("Mass-Training_P_00001_LEFT_CC/", "../up/")),
        "cbis-absolute": tree("cbis-absolute", lambda text: text.replace("Mass-Training_P_00001_LEFT_CC/", "/etc/")),
        "cbis-column": tree("cbis-column", lambda text: text.replace("pathology", "patology")),
        "cbis-binary": tree("cbis-binary"),
        "cbis-bare": tree("cbis-bare"),
        "cbis-semicolons": tree("cbis-semicolons", lambda text: text.replace(",", ";")),
        "cbis-crops": tree("cbis-crops"),
        "cbis-gap": tree("cbis-gap", images=True),
        "kaggle-climbing": tree("kaggle-climbing"),
    }
    next(paths["cbis-binary"].rglob("mass_case_description_train_set.csv")).write_bytes(bytes(range(256)) * 9)
    crop = paths["cbis-crops"] / "Mass-Training_P_00001_LEFT_CC" / "a" / "b" / "1-1.DCM"
    write_dicom(crop, np.zeros((16, 16), np.uint16), "Mass-Training_P_00001_LEFT_CC", "cropped images")
    shutil.rmtree(paths["cbis-gap"] / "CBIS-DDSM" / "Mass-Training_P_00001_LEFT_CC")
    write_kaggle(paths["kaggle-climbing"], own_case_files())
    info = next(paths["kaggle-climbing"].rglob("dicom_info.csv"))
    info.write_text(info.read_text().replace("CBIS-DDSM/jpeg/", "CBIS-DDSM/../jpeg/", 1))
    return paths


def write_checkpoints(folder: Path, vqvae: Path) -> dict[str, Path]:
    """Checkpoints with one wrong part each."""
    folder.mkdir()

    def changed(name: str, **changes: object) -> Path:
        payload = torch.load(vqvae, weights_only=True)
        for key, value in changes.items():
            payload[key] = value(payload[key]) if callable(value) else value
        torch.save(payload, folder / name)
        return folder / name

    def without(key: str) -> Callable[[dict], dict]:
        return lambda part: {name: value for name, value in part.items() if name != key}

    paths = {
        "no-task": changed("no-task", task="nowhere"),
        "text-setting": changed("text-setting", hps=lambda hps: hps | {"hidden_channels": "many"}),
        "text-epoch": changed("text-epoch", epoch="first"),
        "odd-model": changed("odd-model", model=lambda model: model | {"x": 1}),
        "odd-patients": changed("odd-patients", extra={"patients": [["a"]]}),
        "list-kind": changed("list-kind", kind=["vqvae"]),
        "weights-alone": changed("weights-alone", training={}),
        "no-optimizer": changed("no-optimizer", training=without("optimizer")),
        "text-rng": changed("text-rng", training=lambda training: training | {"rng": "random"}),
        "device-split": changed("device-split", hps=lambda hps: hps | {"split_csv": "/dev/zero"}, task="folder"),
        "huge": changed("huge", hps=lambda hps: hps | {"hidden_channels": 10**9}),
        "odd": changed("odd", hps=lambda hps: hps | {"embed_dim": 32}),
        "nan": changed(
            "nan", model=lambda model: {k: v * float("nan") if v.is_floating_point() else v for k, v in model.items()}
        ),
    }
    paths["packed"], paths["flipped"] = folder / "packed", folder / "flipped"
    with zipfile.ZipFile(vqvae) as source, zipfile.ZipFile(paths["packed"], "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    content = bytearray(vqvae.read_bytes())
    content[len(content) // 2] ^= 0x40
    paths["flipped"].write_bytes(bytes(content))
    return paths


def make_files(work: Path, trained: Mapping[str, Path]) -> dict[str, str]:
    """Write good and bad files below `work`; returns their names as the rows have them.

    `trained` names what exists already: vqvae, other (a first stage of other weights), diffusion, latents and images.
    """
    vqvae, latents, folder_of_pngs = trained["vqvae"], trained["latents"], trained["images"]
    bad = work / "bad"
    bad.mkdir()
    paths = dict(trained)
    paths |= {
        name: bad / name
        for name in ("missing", "empty", "garbage", "void", "code", "foreign", "future", "partial", "old", "taken")
    }
    paths["empty"].mkdir()
    paths["garbage"].write_bytes(bytes(range(256)) * 10)
    paths["void"].write_bytes(b"")
    torch.save(Code(bad / "ran"), paths["code"])
    torch.save({"weight": torch.zeros(2)}, paths["foreign"])
    torch.save({"format_version": CHECKPOINT_FORMAT["vqvae"] + 1, "kind": "vqvae"}, paths["future"])
    torch.save({"format_version": CHECKPOINT_FORMAT["vqvae"], "kind": "vqvae"}, paths["partial"])
    torch.save(torch.load(trained["diffusion"], weights_only=True) | {"format_version": 1}, paths["old"])
    paths["mean-only"] = trained["diffusion"].with_name("epoch-0001.pt")
    paths["taken"].mkdir()
    Image.new("L", (96, 128), 90).save(paths["taken"] / "p0.sample-02.png")
    paths["wide"] = work / "wide" / "last.pt"
    succeed("main-vqvae", f"--no-tqdm --hps hidden_channels=32 --epochs 1 --out {work / 'wide'}")
    paths["codes"] = work / "codes"
    succeed("main-latents", f"{vqvae} --no-tqdm --codes-only --out {paths['codes']}")

    def images(name, *patients):
        paths[name] = bad / name
        for patient in patients or ("a", "b", "c"):
            path = bad / name / f"{patient}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((folder_of_pngs / "p0.png").read_bytes())
        return sorted(paths[name].rglob("*.png"))

    images("two", "a", "b")
    images("numbered", *(f"{folder}/{number}" for folder in "abc" for number in (1, 2)))
    for path in images("text"):
        path.write_text("this is no image")
    for path in images("colour"):
        Image.new("RGB", (64, 48), (200, 100, 50)).save(path)
    for path in images("cut"):
        path.write_bytes(path.read_bytes()[:200])
    for path in images("dot"):
        Image.new("L", (1, 1), 100).save(path)
    images("unpaired", "full/a", "full/b", "full/c", "low/a", "low/b")
    images("sizes", *(f"{half}/{patient}" for half in ("full", "low") for patient in "abc"))
    for path in sorted((bad / "sizes" / "low").iterdir()):
        Image.new("L", (50, 50), 99).save(path)
    for name, text in (
        ("no-column", "file,part\na,train\n"),
        ("no-split", "file,split\na,training\n"),
        ("two-splits", "file,split,patient\na,train,1\nb,test,1\nc,validation,2\n"),
        ("no-test", "file,split\na,train\nb,train\nc,validation\n"),
    ):
        images(name)
        (bad / name / "split.csv").write_text(text)

    def broken(name, file, content):
        paths[name] = bad / name
        for path in latents.rglob("*.*"):
            copy = bad / name / path.relative_to(latents)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content(path) if path.relative_to(latents).as_posix() == file else path.read_bytes())

    def without(key):
        return lambda path: json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}).encode()

    broken("text-index", "index.json", lambda _: b"{")
    broken("list-index", "index.json", lambda _: b"[1]")
    broken("binary-index", "index.json", lambda _: b"\xff\xfe")
    broken("no-splits", "index.json", without("splits"))
    broken("no-digest", "index.json", without("first_stage"))
    broken("hollow-index", "index.json", lambda path: path.read_bytes().replace(b'"realisations"', b'"draws"'))
    broken(
        "new-index",
        "index.json",
        lambda path: path.read_bytes().replace(b'"format_version": 1', b'"format_version": 9'),
    )
    broken("cut-array", "train/clean.npy", lambda path: path.read_bytes()[:1000])
    broken("text-array", "train/degraded.npy", lambda _: b"no array")
    broken("pickled-array", "train/clean.npy", lambda _: pickled_array())
    broken("short-array", "validation/clean.npy", lambda _: array_bytes(np.zeros((1, 16, 16, 12), np.float32)))
    broken("wrong-dtype", "train/clean.npy", lambda path: array_bytes(np.load(path).astype(np.int32)))
    broken("long-array", "train/clean.npy", lambda path: path.read_bytes() + bytes(8))
    broken("zip-array", "train/clean.npy", lambda _: zip_bytes())
    broken("climbing-index", "index.json", lambda path: path.read_bytes().replace(b'"train/0000"', b'"../train/0000"'))
    broken(
        "text-draws", "index.json", lambda path: path.read_bytes().replace(b'"realisations": 2', b'"realisations": "2"')
    )
    broken("deep-index", "index.json", lambda _: b"[" * 100_000)
    broken("flat-index", "index.json", lambda path: path.read_bytes().replace(b'"rate": 4', b'"rate": 0'))
    images("climbing")
    (bad / "climbing" / "split.csv").write_text("file,split\n../a.png,train\nb,test\nc,validation\n")
    images("absolute")
    (bad / "absolute" / "split.csv").write_text("file,split\n/etc/passwd,train\nb,test\nc,validation\n")
    for name, place in (("one-bad", "train"), ("bad-test", "test")):
        for path in images(name, *"abcdz"):
            if path.stem == "z":
                path.write_text("this is no image")
        rows = "".join(
            f"{stem},{split}\n"
            for stem, split in zip("abcdz", ("train", "validation", "test", "test", place), strict=True)
        )
        (bad / name / "split.csv").write_text("file,split\n" + rows)
    paths |= write_dicoms(work / "dicoms", folder_of_pngs / "p0.png") | write_oddities(work / "oddities")
    paths |= write_bombs(work / "bombs") | write_trees(work / "trees") | write_checkpoints(work / "damaged", vqvae)
    paths["scan"] = folder_of_pngs / "p0.png"
    paths["busy"], paths["busy-new"], paths["disk"] = work / "busy", work / "busy-new", work / "disk"
    for name in ("busy", "busy-new", "disk"):
        paths[name].mkdir()
        if name != "disk":
            (paths[name] / ".lock").touch()
            (paths[name] / ".latents.lock").touch()
    (paths["busy"] / "last.pt").write_bytes(vqvae.read_bytes())
    paths["odd-log"], paths["deep-file"] = work / "odd-log", bad / "deep-file"
    paths["odd-log"].mkdir()
    (paths["odd-log"] / "last.pt").write_bytes(vqvae.read_bytes())
    (paths["odd-log"] / "log.csv").write_bytes(bytes(range(256)))
    paths["deep-file"].write_text("[" * 100_000)
    models = f"--vqvae-path {vqvae} --load-path {trained['diffusion']}"
    return {name: str(path) for name, path in paths.items()} | {"models": models, "deep": "[" * 2_000, "each": EACH}


def zip_bytes() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


# --- running them -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Another process writes to the folder, and to a latent data set in it."""
    with (folder / ".lock").open() as run, (folder / ".latents.lock").open() as latents:
        for file in (run, latents):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def small_files(limit: int = 20_000) -> Iterator[None]:
    """No file may grow past `limit` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[bool]:
    """A disk of 16 KB at `folder`; False if this process may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file below the folders, except whole entries of caches, which may stay."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and ("cache" not in path.relative_to(folder).parts or path.suffix == ".part")
    }


def is_whole(path: Path) -> bool:
    """Whether a file that a failed call left behind can be read to its end."""
    try:
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npy":
            np.load(path, mmap_mode="r")
        elif path.suffix in (".png", ".jpg"):
            with Image.open(path) as image:
                image.load()
    except Exception:  # noqa: BLE001  whatever the reason is
        return False
    return path.suffix != ".part" and not path.name.endswith(".lock")


def run(row: Row, files: Mapping[str, str]) -> Result | None:
    """Call the script of a row in this folder; None if its environment cannot be made."""
    line = re.sub(r"{([\w-]+)}", lambda name: files[name[1]], row.line)
    bare = line.startswith("BARE ")
    flags = {row.script: ""} if bare else {}
    line = line.removeprefix("BARE ") if bare or row.script in ("main-restore", "main-export") else f"--no-tqdm {line}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(scripts.FLAGS, flags))
        if "busy" in row.line:
            for name in ("busy", "busy-new"):
                stack.enter_context(in_use(Path(files[name])))
        if row.environment == "limit":
            stack.enter_context(small_files())
        if row.environment == "full" and not stack.enter_context(full_disk(Path(files["disk"]))):
            return None
        result = (shell if row.shell else call)(row.script, line)
        if row.environment == "full":
            left = [path.name for path in Path(files["disk"]).rglob("*") if path.is_file() and not is_whole(path)]
            assert not left, f"half-written: {left}"
    return result


def complaint(row: Row, files: Mapping[str, str], work: Path) -> str | None:
    """What is wrong with a script's answer to a row, empty if nothing is; None if it could not be called."""
    before = snapshot(work, Path.cwd())
    try:
        result = run(row, files)
    except Exception as error:  # noqa: BLE001  a traceback is what the rows look for
        return f"{type(error).__name__}: {error}"
    if result is None:
        return None
    pattern = re.sub(r"{([\w-]+)}", lambda name: re.escape(files[name[1]]), row.pattern)
    if result.code != row.status:
        return f"exit status {result.code}: {result.err}"
    if not re.search(pattern, result.err, re.MULTILINE) or "Traceback" in result.err:
        return f"stderr: {result.err}"
    if row.status == 2 and not (result.err.startswith("error: ") and result.err.count("\n") == 1):
        return f"not one line: {result.err}"
    after = snapshot(work, Path.cwd())
    changed = [path for path, state in after.items() if before.get(path) != state]
    if lost := before.keys() - after.keys():
        return f"removed: {lost}"
    if changed and not row.writes:
        return f"written to: {changed[:3]}"
    if any(not is_whole(path) for path in changed):
        return f"half-written: {[path for path in changed if not is_whole(path)]}"
    if (work / "bad" / "ran").exists():
        return "the code in a checkpoint was run"
    return ""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "images").mkdir()
        for i in range(6):
            image = generate_phantom(9, i, (1, 128, 96)).image[0]
            Image.fromarray((image * 255).byte().numpy()).save(work / "images" / f"p{i}.png")
        trained = {name: work / name / "last.pt" for name in ("vqvae", "other", "diffusion")}
        succeed("main-vqvae", f"--task phantom --epochs 1 --no-tqdm --out {work / 'vqvae'}")
        succeed("main-vqvae", f"--task phantom --seed 1 --epochs 1 --no-tqdm --out {work / 'other'}")
        succeed("main-diffusion", f"--vqvae-path {trained['vqvae']} --epochs 2 --no-tqdm --out {work / 'diffusion'}")
        latents = work / "latents"
        succeed("main-latents", f"{trained['vqvae']} --realisations 2 --float32 --no-tqdm --out {latents}")
        files = make_files(work, trained | {"latents": latents, "images": work / "images"})
        wrong = skipped = 0
        table = rows()
        for number, row in enumerate(table):
            here = work / f"here-{number}"
            here.mkdir()
            os.chdir(here)
            answer = complaint(row, files, work)
            skipped += answer is None
            if answer:
                wrong += 1
                print(f"FAILED {row.script} {row.line}\n  expected {row.status}: {row.pattern}\n  {answer}", flush=True)
        os.chdir("/")
    print(
        f"{len(table)} bad inputs: {len(table) - wrong - skipped} passed, {wrong} failed, {skipped} could not be set up here"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
