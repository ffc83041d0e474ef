"""Other names of drugs: international and American ones, acronyms and brand names that data sets use."""

from __future__ import annotations

import re

_SYNONYMS = """
acetaminophen, paracetamol | albuterol, salbutamol | epinephrine, adrenaline | norepinephrine, noradrenaline, levarterenol
isoproterenol, isoprenaline | metaproterenol, orciprenaline | phenylephrine, neosynephrine | lidocaine, lignocaine
rifampin, rifampicin | glyburide, glibenclamide | cyclosporine, ciclosporin, cyclosporin a, cyclosporine a
meperidine, pethidine | aspirin, acetylsalicylic acid | furosemide, frusemide | acyclovir, aciclovir
chlorpheniramine, chlorphenamine | succinylcholine, suxamethonium | valproic acid, valproate, sodium valproate
methotrexate, amethopterin | sulfasalazine, salazosulfapyridine | phenytoin, diphenylhydantoin | tacrolimus, fk506, fk-506
sirolimus, rapamycin | everolimus, rad001 | temsirolimus, cci-779 | doxorubicin, adriamycin | mesalamine, mesalazine
metamizole, dipyrone | tretinoin, all-trans retinoic acid, all-trans-retinoic acid, atra | fluorouracil, 5-fluorouracil, 5-fu
mercaptopurine, 6-mercaptopurine | thioguanine, tioguanine, 6-thioguanine | cytarabine, ara-c, cytosine arabinoside
levothyroxine, thyroxine | cholecalciferol, colecalciferol, vitamin d3 | ascorbic acid, vitamin c | estradiol, oestradiol
cephalexin, cefalexin | amoxicillin, amoxycillin | sulfamethoxazole, sulphamethoxazole | vorinostat, saha | bortezomib, ps-341
imatinib, sti-571, sti571 | gefitinib, zd1839 | erlotinib, osi-774 | lapatinib, gw572016 | sunitinib, su11248
sorafenib, bay 43-9006 | dasatinib, bms-354825 | vemurafenib, plx4032 | trametinib, gsk1120212 | selumetinib, azd6244
palbociclib, pd-0332991 | olaparib, azd2281 | venetoclax, abt-199 | panobinostat, lbh589 | entinostat, ms-275
belinostat, pxd101 | decitabine, 5-aza-2'-deoxycytidine | azacitidine, azacytidine, 5-azacytidine | vincristine, oncovin
paclitaxel, taxol | docetaxel, taxotere | bexarotene, targretin | mitoxantrone, mitozantrone | mechlorethamine, chlormethine
methimazole, thiamazole | diethylstilbestrol, stilboestrol | ethinyl estradiol, ethinylestradiol, ethinyloestradiol
bendroflumethiazide, bendrofluazide | trimeprazine, alimemazine | dicyclomine, dicycloverine | benztropine, benzatropine
trihexyphenidyl, benzhexol | nitrofurazone, nitrofural | hydroxyurea, hydroxycarbamide | penicillamine, d-penicillamine
"""


def plain(name: str) -> str:
    """A name without case, blanks and punctuation."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


_GROUPS = [[plain(name) for name in group.split(",")] for group in re.split(r"[|\n]", _SYNONYMS) if group.strip()]
_GROUP_OF = {name: group for group in _GROUPS for name in group}


def synonyms(name: str) -> list[str]:
    """What else a drug is called, without case, blanks and punctuation."""
    own = plain(name)
    return [other for other in _GROUP_OF.get(own, ()) if other != own]
