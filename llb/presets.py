"""Grids of `python -m llb.ablate` by name: its flags. Those that are given come after these."""

PRESETS = {
    "readme": "--single --detector padim --train-on purified,all,clean --vary submodels=1,2,5,8 --vary keep=0.6,0.8,0.9"
    " --vary aggregate=max,out-of-fold --vary noise_ratio=0,0.1,0.4 --vary detector=subspace,patchcore",
    "paper-table": "--vary noise_ratio=0,0.1,0.2,0.4 --vary detector=dinomaly,padim,rd --train-on purified,all,clean",
    "noise": "--vary noise_ratio=0,0.1,0.2,0.3,0.4 --train-on purified,all,clean",
    "submodels": "--vary submodels=1,2,3,5,8 --train-on none --lowest 0.4",
    "aggregates": "--vary aggregate=mean,median,max,out-of-fold,max-var --train-on none",
    "keep": "--vary keep=auto,0.6,0.7,0.8,0.9,1.0",
    "purification": "--vary noise_ratio=0,0.1,0.2,0.4 --vary detector=dinomaly,padim,patchcore"
    " --train-on purified,all,clean",  # the best threshold of each run: llb.dropping --grid runs/purification --best
    "review": "--vary noise_ratio=0.1,0.2,0.4 --vary detector=padim,patchcore,dinomaly --vary review.errors=0,0.1"
    " --vary review.simulate=24,48,96,150 --vary final.head=auto,none --train-on reviewed,all,clean",
    "steps": "--vary steps=25,50,100,200,400 --train-on none",
    "recipe": "--vary recipe=dinomaly,llbnad --train-on none",
    "dinomaly": "--single --vary set.attention=softmax --vary set.groups=one --vary set.noise=jitter --train-on none "
    "--vary set.class_token=subtract --vary set.easy_factor=1 --vary dropout=0",
}
