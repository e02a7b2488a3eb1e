package yamlfile

import "testing"

func TestSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "4096": 4096, "1kB": 1000, "1KiB": 1024, "12GiB": 12 << 30, "1.5TB": 1.5e12, "2 MiB": 2 << 20, "7B": 7, "1G": 1e9,
	} {
		if got, err := Size(in); err != nil || got != want {
			t.Errorf("Size(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "GiB", "-1", "1iB", "1XB", "9999999PB", "1 2"} {
		if got, err := Size(in); err == nil {
			t.Errorf("Size(%q) = %d, want an error", in, got)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"slot", "slots", 1}, {"kitten", "sitting", 3}} {
		if got := distance(c.a, c.b); got != c.want {
			t.Errorf("distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
