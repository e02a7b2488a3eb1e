package disc

import (
	"context"
	"fmt"
)

// Gather brings a whole set into a store with one drive. insert is asked for where
// a volume is to be read, the first time without missing, then with the numbers
// of those that are still needed; its error ends the whole. say hears what came of
// each volume: an error of one does not end the others. d and got are nil where
// there are none. The first volume says which set it is: those of another are
// refused, and Instead and Older count for that set alone.
func Gather(ctx context.Context, o ImportOptions, insert func(ctx context.Context, missing []int) (path string, err error), say func(d *Discs, got *Imported, err error)) error {
	var missing []int
	set := ""
	for {
		path, err := insert(ctx, missing)
		if err != nil {
			return err
		}
		complete, err := func() (bool, error) {
			d, err := Open(o.Store.CheckSignature, path)
			if err != nil {
				say(nil, nil, err)
				return false, nil
			}
			defer d.Close()
			if set == "" {
				set = d.ID
			}
			if d.ID != set {
				say(nil, nil, fmt.Errorf("%s is volume of the set %.12s (%s), and the set %.12s is being copied: insert a volume of that one", path, d.ID, d.Set, set))
				return false, nil
			}
			got, err := Import(ctx, d, o)
			if ctx.Err() != nil {
				return false, ctx.Err()
			}
			say(d, got, err)
			if got != nil {
				missing = got.Missing
			}
			return err == nil && len(got.Blocked) == 0, nil
		}()
		if err != nil || complete {
			return err
		}
	}
}
