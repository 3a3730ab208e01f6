#!/usr/bin/env bash
# BASD and its literal form on real CIFAR-10, reduced to two processor cores: a DeiT of depth 6 and width 96, part of the training
# images, five epochs, two ranks. The teacher is an ImageNet-pretrained ViT-Tiny/16 read at 128 pixels. A run that is sixty times
# shorter than the recipe's spends three tenths of its steps on the ramps in place of one.
#
#     bash experiments/cifar10_alive.sh CIFAR10_FOLDER VIT_TINY.safetensors OUT_FOLDER
#
# CIFAR10_FOLDER holds CIFAR-10 in the Hugging Face parquet layout. `python experiments/cifar10_alive.py OUT_FOLDER` then
# writes experiments/results/cifar10_alive.json from the run directories.
set -euo pipefail
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
for recipe in basd_cifar10 basd_literal; do
  resume=(); [ -f "$3/$recipe/last.pt" ] && resume=(--resume)
  torchrun --nproc_per_node=2 -m basd train "$recipe" "data.source=hfds/$1" "data.root=$3/cache" data.download=false data.val_size=2000 \
    data.train_size=5120 data.batch_size=128 data.workers=1 \
    teacher.model=vit_tiny_patch16_224 teacher.pretrained=false "teacher.checkpoint=$2" teacher.img_size=128 \
    student.depth=6 student.width=96 student.heads=3 student.drop_path=0 'method.student_layers=[1, 2, 4, 5]' method.selector.name=nearest method.losses.spectral.samples=null method.balance.fraction=0.3 \
    train.epochs=5 train.warmup_epochs=1 train.precision=float32 train.ema=0.99 train.log_every=10 --run-dir "$3/$recipe" "${resume[@]}"
  python -m basd evaluate "$3/$recipe"
done
