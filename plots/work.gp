# FLOPs and bytes against sequence length, side by side.
#
# gnuplot -e "format='png'; output='x.png'; data='flops.gp'; more='bytes.gp'; name='Work'" FILE

load data
load "plots/style.gp"

set multiplot title sprintf("%s: %s", name, shape) noenhanced
set logscale x 2
set logscale y 10
# A label at each T, or at every other one.
stats $data using 1 nooutput
first = int(log(STATS_min) / log(2) + 0.5)
set xtics ("1" 1)
set for [e = first:24:STATS_max / STATS_min > 20 ? 2 : 1] xtics add (octave(e) 2 ** e)
set format y "10^{%L}"
set xlabel "sequence length T"
set offsets graph 0.05, graph 0.05, 0, 0
set tmargin at screen 0.84
set bmargin at screen 0.14

do for [panel = 1:2] {
	if (panel == 2) {
		load more
		set key on at screen 0.765, 0.84 left top
	} else {
		set key off
	}
	set lmargin at screen (panel == 1 ? 0.10 : 0.48)
	set rmargin at screen (panel == 1 ? 0.37 : 0.75)
	set yrange [*:*]
	stats $data using 2 nooutput
	set yrange [STATS_min / 1.5:STATS_max * 1.5]
	set ytics autofreq
	if (fine(STATS_min, STATS_max)) {
		set ytics ("1" 1)
		set for [k = 18:72] ytics add (scientific(k) tic(k))
	}
	set title (panel == 1 ? "FLOPs" : "bytes read and written")
	plot for [i = 1:words(labels)] $data index i - 1 using 1:2 with linespoints \
	     linecolor rgb colour(word(labels, i)) pointtype mark_in(labels, i) pointsize 1.2 \
	     dashtype dash(word(labels, i)) title word(labels, i)
}
unset multiplot
