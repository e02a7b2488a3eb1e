package disc

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"platter/provision/yamlfile"
)

// Spec is what a set is to hold: the file disc.yaml.
type Spec struct {
	Name, Version string
	Date          time.Time // of the set, instead of a clock's
	Arch          []string
	Images        []string // names in the store
	Releases      []string // versions of the stack; Newest for the newest one
	Languages     []string // of the pages
}

// Newest stands for the newest release of the stack that the store has.
const Newest = "newest"

// Arches are the architectures that a set can be for.
var arches = []string{"amd64"}

var imageName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// LoadSpec reads a disc.yaml. Its error is yamlfile.Problems where the content is
// wrong: every mistake with its line.
func LoadSpec(name string) (*Spec, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("cannot read the disc file: %w", err)
	}
	return ParseSpec(name, data)
}

// ParseSpec reads the content of a disc.yaml; name serves messages.
func ParseSpec(name string, data []byte) (*Spec, error) {
	f := yamlfile.Parse(name, data)
	top := f.Root().Fields("name", "version", "date", "arch", "images", "releases", "languages")
	s := &Spec{
		Name:      yamlfile.Get(top["name"].Required(), yamlfile.Match(setName, "lower-case letters, digits and hyphens, at most 32")),
		Version:   yamlfile.Get(top["version"].Required(), yamlfile.Match(version, "a version that begins with a digit, such as 1.0")),
		Date:      yamlfile.Get(top["date"].Required(), parseDate),
		Arch:      words(top["arch"], func(w string) (string, error) { return oneOf(w, arches) }),
		Images:    words(top["images"].Required(), yamlfile.Match(imageName, "the name of an image in the store, such as debian-13")),
		Releases:  words(top["releases"], yamlfile.Match(regexp.MustCompile(`^(newest|[0-9][A-Za-z0-9.+~-]*)$`), "versions of releases of the stack, or newest")),
		Languages: words(top["languages"], func(w string) (string, error) { return oneOf(w, Languages()) }),
	}
	if len(s.Arch) == 0 {
		s.Arch = []string{"amd64"}
	}
	if len(s.Languages) == 0 {
		s.Languages = Languages()
	}
	if err := f.Err(); err != nil {
		return nil, err
	}
	return s, nil
}

func words(list yamlfile.Value, parse func(string) (string, error)) (out []string) {
	for _, v := range list.List() {
		w := yamlfile.Get(v, parse)
		if slices.Contains(out, w) && w != "" {
			v.Failf("%s is there twice", w)
		}
		out = append(out, w)
	}
	return out
}

func oneOf(w string, known []string) (string, error) {
	if !slices.Contains(known, w) {
		return "", fmt.Errorf("%q is not one of: %s", w, strings.Join(known, ", "))
	}
	return w, nil
}

func parseDate(s string) (time.Time, error) {
	t, err := time.Parse(time.DateOnly, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is no date such as 2026-11-22", s)
	}
	return t, nil
}

// volumeSizes are what fits on the media of these names, the smallest that is
// sold as such: CD of 74 minutes, DVD+R, BD-R.
var volumeSizes = map[string]int64{"cd": 681_984_000, "dvd": 4_700_372_992, "bd": 25_025_314_816}

// VolumeSize reads the size of a volume in bytes: cd, dvd, bd, or a number with
// its unit (700MB, 4GiB).
func VolumeSize(s string) (int64, error) {
	if n, ok := volumeSizes[strings.ToLower(s)]; ok {
		return n, nil
	}
	n, err := humanize.ParseBytes(s)
	if err != nil || n == 0 || n > 1<<50 {
		return 0, fmt.Errorf("%q is no size of a volume: use cd, dvd, bd, or a number with its unit such as 700MB", s)
	}
	return int64(n), nil
}
