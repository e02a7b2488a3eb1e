package disk

import (
	"fmt"
	"path"
	"strings"

	"platter/provision"
)

// Select returns the one disk that rule asks for. None and several are named
// stops whose message lists every disk and why it was or was not taken.
func Select(rule provision.DiskRule, disks []Disk) (Disk, *provision.Failure) {
	var matches []Disk
	var seen []string
	for _, d := range disks {
		why := mismatch(rule, d)
		if why == "" {
			matches = append(matches, d)
			why = "matches"
		}
		seen = append(seen, d.String()+": "+why)
	}
	list := strings.Join(seen, "; ")
	switch {
	case len(disks) == 0:
		return Disk{}, &provision.Failure{
			Code:    "disk-none",
			Message: "this machine shows no disk at all",
			Next:    "Check that a disk is fitted and its controller is not hidden in RAID mode by the firmware, then start the machine again",
		}
	case len(matches) == 0:
		return Disk{}, &provision.Failure{
			Code:    "disk-none",
			Message: fmt.Sprintf("no disk fits the rule (%s): %s", ruleString(rule), list),
			Next:    "Correct this node's disk rule in the rack file, or the disk, then start the machine again",
		}
	case len(matches) > 1:
		return Disk{}, &provision.Failure{
			Code:    "disk-ambiguous",
			Message: fmt.Sprintf("%d disks fit the rule (%s): %s", len(matches), ruleString(rule), list),
			Next:    "Name one disk in this node's disk rule in the rack file, by serial for example, then start the machine again",
		}
	}
	return matches[0], nil
}

// mismatch says why the disk does not fit; empty: it fits.
func mismatch(r provision.DiskRule, d Disk) string {
	named := r.Serial != "" || r.WWN != "" || r.Path != ""
	switch {
	case d.ReadOnly:
		return "is read-only"
	case d.InUse != "":
		return "is in use, " + d.InUse
	case d.Removable && !named:
		return "is removable and the rule does not name it"
	case r.Serial != "" && !strings.EqualFold(strings.TrimSpace(r.Serial), d.Serial):
		return "has another serial"
	case r.WWN != "" && NormalWWN(r.WWN) != d.WWN:
		return "has another wwn"
	case r.Path != "" && !pathMatches(r.Path, d):
		return "has another path"
	case r.Model != "" && !glob(r.Model, d.Model):
		return "has another model"
	case r.MinSize > 0 && d.Size < r.MinSize:
		return "is too small"
	case r.MaxSize > 0 && d.Size > r.MaxSize:
		return "is too large"
	}
	return ""
}

func pathMatches(pattern string, d Disk) bool {
	if glob(pattern, d.Path) {
		return true
	}
	pattern = strings.TrimPrefix(pattern, "/dev/disk/by-path/")
	for _, l := range d.Links {
		if glob(pattern, l) {
			return true
		}
	}
	return false
}

func glob(pattern, s string) bool {
	ok, err := path.Match(pattern, s)
	return err == nil && ok
}

func ruleString(r provision.DiskRule) string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, name+" "+value)
		}
	}
	add("serial", r.Serial)
	add("wwn", r.WWN)
	add("path", r.Path)
	add("model", r.Model)
	if r.MinSize > 0 {
		add("at least", Bytes(r.MinSize))
	}
	if r.MaxSize > 0 {
		add("at most", Bytes(r.MaxSize))
	}
	if len(parts) == 0 {
		return "any fixed, writable disk"
	}
	return strings.Join(parts, ", ")
}
